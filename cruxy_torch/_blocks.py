"""How tensors are treated a piece at a time: blocks of one, buckets of many, devices apart."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cruxy_torch._kept import BLOCK_SIZE, Coded, Kept, kind

BLOCK = 1 << 22
"""Elements treated at a time where temporaries are needed: they stay below 16 MiB each."""


def blocks(first: Tensor, *others: Kept) -> Iterator[tuple[Any, ...]]:
    """Views of equally shaped tensors along the first axis, `BLOCK` elements or one row each.

    Where one of them is coded, enough rows to fill whole blocks of codes.
    """
    if first.numel() <= BLOCK or first.ndim == 0:
        yield first, *others
        return
    row = first.numel() // len(first)
    rows = max(1, BLOCK // row)
    if any(isinstance(kept, Coded) for kept in others):
        whole = BLOCK_SIZE // math.gcd(row, BLOCK_SIZE)
        rows = max(1, rows // whole) * whole
    yield from zip(first.split(rows), *(kept.split(rows) for kept in others), strict=True)


def buckets(first: Sequence[Tensor], *others: Sequence[Kept]) -> Iterator[list[int]]:
    """Indices of tensors kept alike, at most `4 * BLOCK` elements (or one tensor) together.

    The temporaries of a foreach call are then those of a bucket, not of the whole model.
    """
    open_buckets: dict[tuple, tuple[list[int], int]] = {}
    for index, row in enumerate(zip(first, *others, strict=True)):
        alike = tuple(map(kind, row))
        indices, size = open_buckets.get(alike, ([], 0))
        if indices and size + row[0].numel() > 4 * BLOCK:
            yield indices
            indices, size = [], 0
        open_buckets[alike] = ([*indices, index], size + row[0].numel())
    for indices, _ in open_buckets.values():
        yield indices


def by_device(tensors: Sequence[Kept]) -> dict[torch.device, list[int]]:
    """Indices of the tensors on each device."""
    indices: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        indices.setdefault(tensor.device, []).append(index)
    return indices
