"""A tensor as one row of numbers in the code of activations, a piece at a time."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cruxy_exact.affine import GROUP, AffineCode
from cruxy_exact.codes import pack, unpack
from cruxy_exact.random_bits import random_bits
from cruxy_torch._kept import numbers

PIECE = 1 << 20
"""Elements coded at a time: temporaries stay below 4 MiB each."""


class CodedFlat(NamedTuple):
    """The numbers of a tensor in a row, as codes.

    Attributes:
        codes: uint8, a group to a row: `(groups, 256)`, for 4 bits `(groups, 128)`, the first half
            of a group in the lower bits.
        offsets: bfloat16, `(groups,)`.
        steps: likewise.
        code: what they mean.
        count: elements.
        dtype: of the tensor.
    """

    codes: Tensor
    offsets: Tensor
    steps: Tensor
    code: AffineCode
    count: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes, offsets and steps."""
        return sum(part.numel() * part.element_size() for part in self[:3])


def encode(flat: Tensor, code: AffineCode, key: Tensor | None) -> CodedFlat:
    """Codes a tensor of one axis.

    Args:
        flat: float32, bfloat16 or float16, of at least one element.
        code: how.
        key: of the random bits, from `stream_key`; `None` rounds to the nearest level.
    """
    groups = -(-len(flat) // GROUP)
    new = flat.new_empty
    codes = new((groups, GROUP * code.bits // 8), dtype=torch.uint8)
    offsets, steps = (new(groups, dtype=torch.bfloat16) for _ in range(2))
    for begin in range(0, groups, PIECE // GROUP):
        x = flat[begin * GROUP : begin * GROUP + PIECE].to(torch.float32)
        missing = -len(x) % GROUP
        if missing:  # by what widens no group
            x = torch.cat((x, x[-1:].expand(missing)))
        x = x.view(-1, GROUP)
        offset, step = code.offset_and_step(x.amin(1, True), x.amax(1, True), xp=torch)
        noise: Any = code.half
        if key is not None:
            index = numbers(x.numel(), begin * GROUP, x.device).view(x.shape)
            noise = code.noise(random_bits(key, index))
        own = code.encode(x, offset, step, noise, xp=torch)
        here = slice(begin, begin + len(x))
        codes[here] = own if code.bits == 8 else pack(*own.split(GROUP // 2, dim=1))
        offsets[here], steps[here] = offset[:, 0], step[:, 0]
    return CodedFlat(codes, offsets, steps, code, len(flat), flat.dtype)


def decode(coded: CodedFlat) -> Tensor:
    """The tensor of one axis that was coded, in its dtype, up to the end of its last group."""
    code, groups = coded.code, len(coded.codes)
    flat = coded.codes.new_empty(groups * GROUP, dtype=coded.dtype)
    rows = flat.view(groups, GROUP)
    for begin in range(0, groups, PIECE // GROUP):
        here = slice(begin, begin + PIECE // GROUP)
        codes = coded.codes[here]
        if code.bits == 4:
            codes = torch.cat(unpack(codes), dim=1)
        offset, step = (part[here, None].to(torch.float32) for part in coded[1:3])
        rows[here] = code.decode(codes, offset, step, xp=torch)
    return flat
