"""An entry of the comparison whose activations are kept in fewer bits."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch.optim import Optimizer

from benchmarks._torch.optimizers import Groups, TorchOptimizer


class CompressedRun(NamedTuple):
    """An optimizer to compare, as `TorchOptimizer`, and how its activations are kept.

    Attributes:
        inner: the optimizer.
        bits: of the activations.
        engine: the module that trains it.
    """

    inner: TorchOptimizer
    bits: int
    engine: str = "activations"

    @classmethod
    def of(cls, inner: TorchOptimizer, bits: int) -> "CompressedRun":
        """The same optimizer with activations in so many bits."""
        sources = ("benchmarks/_torch/compressed_run.py", "benchmarks/_torch/activations.py")
        label = f"{inner.label}, activations in {bits} bits"
        return cls(inner._replace(label=label, sources=(*inner.sources, *sources)), bits)

    @property
    def label(self) -> str:
        """For tables and plots."""
        return self.inner.label

    @property
    def make(self) -> Callable[[Groups, float], Optimizer]:
        """From parameter groups and the rate."""
        return self.inner.make

    @property
    def averaged(self) -> Callable[[Any], AbstractContextManager[Any]]:
        """From the optimizer, a context in which the parameters are those to evaluate at."""
        return self.inner.averaged

    @property
    def default(self) -> float:
        """The rate that it comes with."""
        return self.inner.default

    @property
    def sources(self) -> tuple[str, ...]:
        """Patterns of the files that define it."""
        return self.inner.sources

    def rates(self) -> tuple[float, ...]:
        """Its grid."""
        return self.inner.rates()
