"""What an entry of the comparison is in PyTorch, the original `cruxy`, and what people use.

As in JAX, all decay matrices alone by 0.1, the rate is the one knob, and the rest is as their
authors set it. A package is asked for only when its optimizer is made.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks._rates import RATES, WEIGHT_DECAY, scaled, warm_up_cosine

Groups = list[dict[str, Any]]

SOURCES = ("benchmarks/_torch/optimizers.py", "benchmarks/_rates.py")


def _as_it_is(model: nn.Module, seed: int, step: int) -> AbstractContextManager[Any]:
    return nullcontext()


def groups(model: nn.Module) -> Groups:
    """Weight decay is for matrices; gains and biases are left alone."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


class TorchOptimizer(NamedTuple):
    """An optimizer to compare.

    Attributes:
        label: for tables and plots.
        make: from parameter groups and the rate.
        scale: of its grid of rates to `RATES`, as in JAX.
        schedule: from the steps taken and those of the run to the rate's factor; `None` for a
            constant rate.
        takes_loss: whether `step` is given the loss.
        averaged: from the optimizer, a context in which the parameters are those to evaluate at.
        forward: from the model, the run's seed and the number of the step, a context for the
            forward pass.
        grouped: from a model to its parameter groups.
        grid: the rates to try, before `scale`.
        default: the rate that it comes with, as in JAX.
        sources: patterns, from the repository's root, of the files that define it.
    """

    label: str
    make: Callable[[Groups, float], Optimizer]
    scale: float = 1.0
    schedule: Callable[[int, int], float] | None = None
    takes_loss: bool = False
    averaged: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    forward: Callable[[nn.Module, int, int], AbstractContextManager[Any]] = _as_it_is
    grouped: Callable[[nn.Module], Groups] = groups
    grid: tuple[float, ...] = RATES
    default: float = 1e-3
    sources: tuple[str, ...] = SOURCES

    def rates(self) -> tuple[float, ...]:
        """Its grid."""
        return scaled(self.grid, self.scale)


def _adamw(**arguments: Any) -> Callable[[Groups, float], Optimizer]:
    return lambda groups, rate: torch.optim.AdamW(groups, lr=rate, **arguments)


def _imported(
    place: str, extra: str = "bench", **arguments: Any
) -> Callable[[Groups, float], Optimizer]:
    """Makes an optimizer of another package, which is imported only then.

    Args:
        place: the class with its module.
        extra: of this project, that installs the package.
        **arguments: of the class, besides the groups and the rate.
    """
    module, _, name = place.rpartition(".")

    def make(groups: Groups, rate: float) -> Optimizer:
        try:
            package = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{name} needs the package {error.name}, which is not installed; "
                f"run pip install -e '.[{extra}]'."
            ) from error
        return getattr(package, name)(groups, lr=rate, **arguments)

    return make


def _schedule_free(groups: Groups, rate: float) -> Optimizer:
    optimizer: Any = _imported("schedulefree.AdamWScheduleFree")(groups, rate)
    optimizer.train()
    return optimizer


@contextmanager
def _switched(optimizer: Any) -> Iterator[None]:
    """Between `eval()` and `train()`."""
    optimizer.eval()
    yield
    optimizer.train()


# It takes no rate above 1e-2, whatever is set.
ORIGINAL = {
    "cruxy-meta3": TorchOptimizer(
        "cruxy 2.1.0, Meta3", _imported("cruxy.CruxyOptimizer"), takes_loss=True
    ),
    "cruxy-meta_lion": TorchOptimizer(
        "cruxy 2.1.0, Meta-Lion",
        _imported("cruxy.CruxyOptimizer", use_lion=True, betas=(0.9, 0.99)),
        scale=0.1,
        takes_loss=True,
        default=1e-4,
    ),
}
"""The original."""

PEERS = {
    "adamw": TorchOptimizer("AdamW fused, constant", _adamw(fused=True)),
    "adamw-cosine": TorchOptimizer(
        "AdamW fused, warm-up and cosine", _adamw(fused=True), schedule=warm_up_cosine
    ),
    "adamw-foreach": TorchOptimizer("AdamW foreach, constant", _adamw(foreach=True)),
    "schedule-free": TorchOptimizer(
        "Schedule-Free AdamW", _schedule_free, averaged=_switched, default=2.5e-3
    ),
    "prodigy": TorchOptimizer("Prodigy", _imported("prodigyopt.Prodigy"), scale=100.0, default=1.0),
    "stable-adamw": TorchOptimizer("StableAdamW", _imported("pytorch_optimizer.StableAdamW")),
    "adagc": TorchOptimizer("AdaGC", _imported("pytorch_optimizer.AdaGC")),
}
"""What people use."""

LOW_BIT = {
    "torchao-adamw-8bit": TorchOptimizer(
        "torchao AdamW8bit", _imported("torchao.optim.AdamW8bit", "low-bit")
    ),
    "torchao-adamw-4bit": TorchOptimizer(
        "torchao AdamW4bit", _imported("torchao.optim.AdamW4bit", "low-bit")
    ),
    "bitsandbytes-adamw-8bit": TorchOptimizer(
        "bitsandbytes AdamW8bit", _imported("bitsandbytes.optim.AdamW8bit", "low-bit")
    ),
    "bitsandbytes-lion-8bit": TorchOptimizer(
        "bitsandbytes Lion8bit",
        _imported("bitsandbytes.optim.Lion8bit", "low-bit"),
        scale=0.1,
        default=1e-4,
    ),
}
"""With states of few bits, in parameters of 4,096 elements or more."""
