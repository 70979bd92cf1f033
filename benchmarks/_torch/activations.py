"""Entries of the comparison whose activations are kept in fewer bits for the backward pass."""

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from benchmarks._torch.optimizers import TorchOptimizer
from cruxy_torch import compress_activations


def compressed(inner: TorchOptimizer, bits: int) -> TorchOptimizer:
    """The same optimizer, its activations in so many bits."""

    def forward(model: nn.Module, seed: int, step: int) -> AbstractContextManager[Any]:
        return compress_activations(model, bits, seed=seed, step=step)

    return inner._replace(
        label=f"{inner.label}, activations in {bits} bits",
        forward=forward,
        sources=(*inner.sources, "benchmarks/_torch/activations.py"),
    )
