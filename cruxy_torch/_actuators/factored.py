"""The second moment of a matrix as one row and one column of means, and the gradient over its root.

Adafactor's (Shazeer and Stern, [arXiv 1804.04235](https://arxiv.org/abs/1804.04235)), in the form
of `optax.scale_by_factored_rms`. A tensor is treated in blocks, so that temporaries stay small, and
a sharded gradient gives what the whole one would: sums over a sharded axis are reduced over the
mesh.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cruxy_control.formulas.factored import factored_axes, inverse_power
from cruxy_torch._actuators.staged import Stages, total
from cruxy_torch._actuators.stepped import SteppedTensor
from cruxy_torch._distributed.shards import local, zeros_without
from cruxy_torch._kept import compute_dtype

EPS = 1e-30
"""Added to every mean square (optax's `epsilon`), so that zeros are not divided by zero."""


class Normalised(NamedTuple):
    """This rank's part of a gradient over the root of its second moment: `u`.

    Attributes:
        block: gives `u` of a block by its number, in the dtype of the arithmetic; not to be written
            to.
        squares: the sum of all squares of `u` on this rank; 0-d.
    """

    block: Callable[[int], Tensor]
    squares: Tensor


def start(param: Tensor, min_dim: int) -> dict[str, Tensor]:
    """The second moment before the first step, by name.

    `row_var` and `col_var`, means over the largest and over the second largest axis, each of which
    is kept with one element; or `variance`, of the shape of the parameter, where it has no two axes
    of at least `min_dim`.
    """
    axes, dtype = factored_axes(param.shape, min_dim), compute_dtype(param)
    if axes is None:
        return {"variance": torch.zeros_like(param, dtype=dtype)}
    second, first = axes
    return {
        "row_var": zeros_without(param, first, dtype),
        "col_var": zeros_without(param, second, dtype),
    }


def normalise(
    tensor: SteppedTensor, decay: Tensor, ok: Tensor, power: float = 1.0
) -> Stages[Normalised]:
    """Takes a gradient into its second moment and divides it by the root of that.

    Args:
        tensor: with its gradient, and in its state what `start` gave; changed in place.
        decay: of the second moment; 1 on a skipped step.
        ok: whether the step counts; where false `u` is 0, whatever the gradient.
        power: of the root, in `[0, 1]`; see `inverse_power`.
    """
    kept = tensor.blocks == 1 and tensor.keeps
    read = _Blocks(tensor.blocks, tensor.gradient, kept)
    where = [tensor.place(i) for i in range(tensor.blocks)]
    if "variance" in tensor.state:
        variance = local(tensor.state["variance"])
        for i, place in enumerate(where):
            variance[place].mul_(decay).add_((read(i).square() + EPS) * (1.0 - decay))
        # A skipped first step leaves zeros, whose inverse times a gradient of 0 is NaN.
        unit = _Blocks(
            tensor.blocks,
            lambda i: read(i) * torch.where(ok, _inverse(variance[where[i]], power), 0),
            kept,
        )
    else:
        rows, columns = yield from _factors(tensor, read, decay, ok, power)
        unit = _Blocks(
            tensor.blocks, lambda i: read(i) * _at(rows, where[i]) * _at(columns, where[i]), kept
        )
    squares = torch.stack([unit(i).square().sum() for i in range(tensor.blocks)]).sum()
    return Normalised(unit, squares)


def _factors(
    tensor: SteppedTensor, read: "_Blocks", decay: Tensor, ok: Tensor, power: float
) -> Stages[tuple[Tensor, Tensor]]:
    """Advances both means; the two factors whose product is one over the root of the moment."""
    shape = tensor.shape
    second, first = factored_axes(shape, 0) or (0, 0)
    row, column = local(tensor.state["row_var"]), local(tensor.state["col_var"])
    found: dict[int, list[Tensor]] = {first: [], second: []}
    for i in range(read.count):
        square = read(i).square()
        for axis, sums in found.items():
            sums.append(square.sum(axis, keepdim=True))
    axes = (first, second)
    own = [torch.stack(found[a]).sum(0) if a == 0 else torch.cat(found[a]) for a in axes]
    totals = yield list(zip(own, axes, strict=True))
    for kept, axis, whole in zip((row, column), axes, totals, strict=True):
        kept.copy_(advanced(kept, whole / shape[axis], decay))
    mean = (yield from total(row.sum(second, keepdim=True), second)) / shape[second]
    return inverses(row, column, mean, ok, power)


def advanced(kept: Tensor, mean: Tensor, decay: Tensor) -> Tensor:
    """A mean of squares after one more step."""
    return kept * decay + (mean + EPS) * (1.0 - decay)


def inverses(
    row: Tensor, column: Tensor, mean: Tensor, ok: Tensor, power: float
) -> tuple[Tensor, Tensor]:
    """The two factors whose product is one over the root of the moment; 0 on a skipped step."""
    # A skipped first step leaves zeros, whose inverse times a gradient of 0 is NaN.
    first, second = _inverse(row / mean, power), _inverse(column, power)
    return torch.where(ok, first, 0), torch.where(ok, second, 0)


def _inverse(v: Tensor, power: float) -> Tensor:
    """`v^(-power / 2)`; of the whole root torch has a function."""
    return v.rsqrt() if power == 1.0 else inverse_power(v, power, xp=torch)


class _Blocks:
    """Computes blocks by their number, anew each time unless the only one is kept."""

    def __init__(self, count: int, compute: Callable[[int], Tensor], kept: bool) -> None:
        self.count = count
        self._compute, self._kept = compute, kept
        self._only: Tensor | None = None

    def __call__(self, number: int) -> Tensor:
        if not self._kept:
            return self._compute(number)
        if self._only is None:
            self._only = self._compute(number)
        return self._only


def _at(factor: Tensor, place: Any) -> Tensor:
    """A block of a factor, which may be the same for all rows."""
    return factor if len(factor) == 1 else factor[place]
