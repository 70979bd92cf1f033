"""How a tensor is kept between steps where it is not kept as it is: rounded, or as low-bit codes.

A step reads such a tensor as ordinary numbers and writes them back. What rounding leaves to chance
follows from the step's key and the number of each element, so that a run can be repeated.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from cruxy_exact.codes import pack, unpack
from cruxy_exact.random_bits import random_bits, round_to_bfloat16
from cruxy_torch._distributed.shards import is_sharded

# torch's foreach calls are what torch.optim itself is built on, underscore and all.
# pyright: reportPrivateImportUsage=false

BLOCK_SIZE = 256
"""Elements that share a scale."""


class Rounded(NamedTuple):
    """A bfloat16 tensor into which float32 values are rounded up or down by chance.

    Attributes:
        values: the tensor.
        first: the number of its first element.
    """

    values: Tensor
    first: int

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.values.device

    @property
    def kind(self) -> tuple[Any, ...]:
        """What tensors have to have in common to be treated together."""
        return (Rounded, self.device)

    def split(self, rows: int) -> "list[Rounded]":
        """Views along the first axis."""
        step = rows * self.values[0].numel()
        parts = self.values.split(rows)
        return [Rounded(part, self.first + i * step) for i, part in enumerate(parts)]


class Coded(NamedTuple):
    """Low-bit codes, a block of consecutive elements to a row, the last one filled with zeros.

    Attributes:
        codes: one byte an element, int8 or uint8, `(blocks, 256)`; two elements to a byte, uint8,
            `(blocks, 128)`: the first half of a block in the lower bits. Of an average int8 or
            int16, `(blocks, 256)`.
        scales: bfloat16, `(blocks,)`.
        code: what they mean: a `BlockCode`, of an average a `NearCode`.
        shape: of the tensor.
        first: the number of its first element.
    """

    codes: Tensor
    scales: Tensor
    code: Any
    shape: torch.Size
    first: int

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.codes.device

    @property
    def kind(self) -> tuple[Any, ...]:
        """What tensors have to have in common to be treated together."""
        return (self.code, self.device)

    def split(self, rows: int) -> "list[Coded]":
        """Views along the first axis; `rows` must fill whole blocks."""
        blocks = rows * math.prod(self.shape[1:]) // BLOCK_SIZE
        pairs = zip(self.codes.split(blocks), self.scales.split(blocks), strict=True)
        parts, left = [], self.shape[0]
        for i, (codes, scales) in enumerate(pairs):
            shape = torch.Size((min(rows, left), *self.shape[1:]))
            first = self.first + i * blocks * BLOCK_SIZE
            parts.append(Coded(codes, scales, self.code, shape, first))
            left -= rows
        return parts


Kept = Tensor | Rounded | Coded
"""A tensor as it is kept between steps."""

_BY_CHANCE = (Rounded, Coded)


def any_by_chance(column: Iterable[Kept]) -> bool:
    """Whether anything in a column may be rounded by chance."""
    # No set: Dynamo 2.13 may miss the type of a named tuple in one, and all bits would be the same.
    return any(type(kept) in _BY_CHANCE for kept in column)


def kind(kept: Kept | None) -> tuple[Any, ...]:
    """What tensors have to have in common to be treated together; `None` has nothing."""
    if kept is None:
        return ()
    return (kept.dtype, kept.device) if isinstance(kept, Tensor) else kept.kind


def raw(kept: Kept) -> Tensor:
    """The tensor that its numbers or codes are kept in."""
    return kept if isinstance(kept, Tensor) else kept[0]


def plain(numbers: Tensor) -> Tensor:
    """Numbers as a plain tensor where they are of a class that wraps others, which costs a wait."""
    if type(numbers) is Tensor or is_sharded(numbers):
        return numbers
    values = [number.item() for number in numbers.reshape(-1).unbind()]
    whole = torch.tensor(values, dtype=numbers.dtype, device=numbers.device)
    return whole.reshape(numbers.shape)


def compute_dtype(kept: Kept) -> torch.dtype:
    """What a tensor's arithmetic runs in: float64 for float64, else float32."""
    whole = isinstance(kept, Tensor) and kept.dtype == torch.float64
    return torch.float64 if whole else torch.float32


def read(column: Sequence[Kept], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The numbers of tensors of one kind; those that are kept as they are may be returned."""
    if column and isinstance(column[0], Coded):
        values = _decoded(cast(Sequence[Coded], column))
    else:
        plain = cast(Sequence[Rounded | Tensor], column)
        values = [kept.values if isinstance(kept, Rounded) else kept for kept in plain]
    return [value.to(dtype) for value, dtype in zip(values, dtypes, strict=True)]


def write(column: Sequence[Kept], values: Sequence[Tensor], key: Any, ok: Tensor) -> None:
    """Keeps the numbers of tensors of one kind.

    Args:
        column: the tensors.
        values: one for each.
        key: of this step's random bits, from `cruxy_exact.random_bits.stream_key`; `None` rounds
            codes to the nearest.
        ok: where false codes stay as they are, since coding anew is not exact.
    """
    if column and isinstance(column[0], Coded):
        _encode(cast(Sequence[Coded], column), values, key, ok)
    elif column and isinstance(column[0], Rounded):
        for kept, value in zip(cast(Sequence[Rounded], column), values, strict=True):
            _round(kept, value, key)
    else:
        assign(cast(Sequence[Tensor], column), values)


def assign(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies each value into its target, if it is not the target itself."""
    pairs = [(t, v) for t, v in zip(targets, values, strict=True) if t is not v]
    if pairs and not torch.compiler.is_compiling():
        torch._foreach_copy_([t for t, _ in pairs], [v for _, v in pairs])
        return
    # Inductor 2.13 moves a foreach copy in front of what still reads the old values.
    for target, value in pairs:
        target.copy_(value)


def _round(kept: Rounded, value: Tensor, key: Any) -> None:
    value = value.to(torch.float32)
    bits = random_bits(key, numbers(value.numel(), kept.first, value.device).view(value.shape))
    kept.values.copy_(round_to_bfloat16(value, bits, xp=torch))


def _decoded(column: Sequence[Coded]) -> list[Tensor]:
    code = column[0].code
    codes = _joined([kept.codes for kept in column])
    if code.bits == 4:
        codes = torch.cat(unpack(codes), dim=1)
    scales = _joined([kept.scales for kept in column]).to(torch.float32)
    values = code.decode(codes, scales[:, None], xp=torch)
    whole = values.split([len(kept.codes) for kept in column])
    return [
        blocks.view(-1)[: kept.shape.numel()].view(kept.shape)
        for blocks, kept in zip(whole, column, strict=True)
    ]


def _encode(column: Sequence[Coded], values: Sequence[Tensor], key: Any, ok: Tensor) -> None:
    code = column[0].code
    x = _joined([in_blocks(value, torch.float32) for value in values])
    scales = code.scale(x.abs().amax(1), xp=torch)
    noise: Any = code.half
    if key is not None:
        own = [numbers(len(k.codes) * BLOCK_SIZE, k.first, x.device) for k in column]
        noise = code.noise(random_bits(key, _joined(own).view(x.shape)))
    codes = code.encode(x, scales[:, None], noise, xp=torch)
    if code.bits == 4:
        codes = pack(*codes.split(BLOCK_SIZE // 2, dim=1))
    sizes = [len(kept.codes) for kept in column]
    for targets, whole in (
        ([kept.codes for kept in column], codes),
        ([kept.scales for kept in column], scales.to(torch.bfloat16)),
    ):
        kept_or_new = torch.where(ok, whole, _joined(targets))
        assign(targets, kept_or_new.split(sizes))


def in_blocks(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The elements of a tensor, those that share a scale to a row, filled up with zeros."""
    flat = value.to(dtype).reshape(-1)
    missing = -flat.numel() % BLOCK_SIZE
    if missing:
        flat = torch.nn.functional.pad(flat, (0, missing))
    return flat.view(-1, BLOCK_SIZE)


def numbers(count: int, first: int, device: torch.device) -> Tensor:
    """`count` numbers from `first`, which wrap as int32."""
    first = (first + 2**31) % 2**32 - 2**31
    return torch.arange(count, dtype=torch.int32, device=device) + first


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
