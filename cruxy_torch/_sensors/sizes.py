"""How large parameters are: what a relative limit measures."""

# torch's foreach calls are what torch.optim itself is built on, underscore and all.
# pyright: reportPrivateImportUsage=false

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cruxy_torch._distributed.shards import add_shards, local
from cruxy_torch._kept import compute_dtype, plain
from cruxy_torch._native.fit import Passes, SetAsideError


class Sizes(NamedTuple):
    """How large tensors are.

    Attributes:
        mean_squares: the mean of the squares of each tensor, a float32 vector.
        counts: the elements of each, of a `DTensor` in all its shards.
    """

    mean_squares: Tensor
    counts: list[int]


def sizes(tensors: Sequence[Tensor], *, native: Passes | None) -> Sizes:
    """Of each tensor, of a `DTensor` over all its shards.

    Args:
        tensors: of any devices and real dtypes.
        native: a library that takes what it can take; `None` for none.

    Returns:
        With a vector on the device of the first tensor.
    """
    device = tensors[0].device
    shards = list(map(local, tensors))
    counts = [max(1, tensor.numel()) for tensor in tensors]
    means, slow = _by(native, shards, counts, device)
    for i in slow:
        flat = shards[i].detach().reshape(-1).to(compute_dtype(shards[i]))
        means[i] = (torch.dot(flat, flat) / counts[i]).to(device, torch.float32)
    total = plain(torch.stack([means[i] for i in range(len(tensors))]))
    add_shards(total, tensors)
    return Sizes(total, [tensor.numel() for tensor in tensors])


def sizes_by_group(
    groups: Sequence[Sequence[Tensor]], *, native: Passes | None
) -> list[Sizes | None]:
    """`sizes` of each group, `None` of one without tensors; shards of all are added up together.

    Args:
        groups: the tensors of each.
        native: a library that takes what it can take; `None` for none.
    """
    everything = [tensor for group in groups for tensor in group]
    if not everything:
        return [None] * len(groups)
    squares, counts = sizes(everything, native=native)
    found: list[Sizes | None] = []
    begin = 0
    for group in groups:
        end = begin + len(group)
        found.append(Sizes(squares[begin:end], counts[begin:end]) if group else None)
        begin = end
    return found


def _by(
    native: Passes | None, shards: list[Tensor], counts: list[int], device: torch.device
) -> tuple[dict[int, Tensor], list[int]]:
    """The mean squares that a library finds, by number of the tensor, and the others' numbers."""
    means: dict[int, Tensor] = {}
    if native is None:
        return means, list(range(len(shards)))
    fast, slow = native.parts([shards])
    for part in fast:
        try:
            values = native.mean_squares([shards[i] for i in part], [counts[i] for i in part])
        except SetAsideError:
            slow = [*slow, *part]
            continue
        means |= zip(part, values.to(device).unbind(), strict=True)
    return means, slow


def whole_mean_square(sizes: Sequence[Sizes]) -> Tensor | None:
    """The mean of the squares of all elements together; `None` of no tensors."""
    if not sizes:
        return None
    device, total = sizes[0].mean_squares.device, max(1, sum(sum(s.counts) for s in sizes))
    parts: list[Tensor] = []
    for squares, counts in sizes:
        # Not a vector of counts: that would be a copy to the device in every step.
        parts += torch._foreach_mul(squares.to(device).unbind(), [n / total for n in counts])
    return torch.stack(parts).sum()


def factors_of(numbers: Sequence[float], like: Tensor) -> Tensor | float:
    """What multiplies each element of a vector by its number.

    Args:
        numbers: one for each element.
        like: the vector.
    """
    if len(set(numbers)) == 1:
        return numbers[0]
    if like.is_cpu:
        return like.new_tensor(numbers)
    # A vector of the numbers would be a copy to the device in every step.
    return torch.stack(torch._foreach_mul(torch.ones_like(like).unbind(), list(numbers)))
