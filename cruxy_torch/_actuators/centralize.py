"""Gradient centralization, for weights laid out as PyTorch lays them out: the output axis first."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cruxy_torch._distributed.shards import rows_are_whole


def centralized(x: Tensor) -> Tensor:
    """The tensor less its mean over all axes but the first; one of fewer axes as it is."""
    if x.ndim < 2:
        return x
    axes = tuple(range(1, x.ndim))
    if torch.compiler.is_compiling():
        # Inductor on CPU cannot compile a plain mean in front of an in-place update
        # (pytorch/pytorch#196570).
        return x - torch.var_mean(x, axes, correction=0, keepdim=True)[1]
    return x - x.mean(axes, keepdim=True)


def check_centralizable(grads: Sequence[Tensor]) -> None:
    """Raises unless each rank holds whole rows of every gradient.

    Raises:
        ValueError: where a row is split.
    """
    for grad in grads:
        if not rows_are_whole(grad):
            raise ValueError(
                "use_gc needs whole rows on each rank, got a gradient placed as "
                f"{grad.placements}; shard that parameter along its first axis, or give it a "  # pyright: ignore[reportAttributeAccessIssue]
                "parameter group with use_gc=False."
            )
