"""The Triton kernels: all that is measured of many tensors in one launch, and their whole update.

A program takes one chunk of one tensor, tile by tile. Where tensors lie stands in a table of
addresses, see `triton_tables`. Products are not contracted with sums (`enable_fp_fusion=False`),
roots and quotients are rounded as IEEE says, and bfloat16 is handled as the upper half of a
float32, so that a step gives the numbers of the reference and needs no bfloat16 in hardware.
"""

# What is known at compile time is written as a type, and an `if` of it leaves names unset.
# pyright: reportInvalidTypeForm=false, reportPossiblyUnboundVariable=false, reportMissingImports=false

from typing import Any

try:
    import triton
    import triton.language
except ImportError:  # tools import every module; nothing here is called then
    triton: Any = None

tl: Any = None if triton is None else triton.language
jit: Any = (lambda function: function) if triton is None else triton.jit
constexpr: Any = "constexpr" if triton is None else tl.constexpr

ROWS = 4
"""Blocks of 256 elements in a tile."""

TILE = 256 * ROWS
"""Elements of a tile."""


@jit
def _pointer(address, DTYPE: constexpr, ALIGNED: constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@jit
def places(ROWS: constexpr):
    """Where the elements of a tile lie in it: blocks of two halves, as 4-bit codes pack them."""
    row = tl.arange(0, ROWS)[:, None, None]
    half = tl.arange(0, 2)[None, :, None]
    return row * 256 + half * 128 + tl.arange(0, 128)[None, None, :]


@jit
def _read(pointer, offset, inside, MASKED: constexpr):
    if MASKED:
        return tl.load(pointer + offset, mask=inside, other=0)
    else:
        return tl.load(pointer + offset)


@jit
def _keep(pointer, offset, value, inside, MASKED: constexpr):
    if MASKED:
        tl.store(pointer + offset, value, mask=inside)
    else:
        tl.store(pointer + offset, value)


@jit
def _widened(bits):
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@jit
def _upper(word):
    return (word >> 16).to(tl.int16)


@jit
def _narrowed(x, random, CHANCE: constexpr):
    """The bits of a bfloat16: the nearest, ties to even, or up or down by chance."""
    word = x.to(tl.int32, bitcast=True)
    if CHANCE:
        noise = tl.where(tl.abs(x) < float("inf"), (random >> 16) & 0xFFFF, 0)
    else:
        noise = 0x7FFF + ((word >> 16) & 1)
    return _upper(tl.where(x == x, word + noise, 0x7FC00000))


@jit
def plain(
    address, at, left, FORMAT: constexpr, MASKED: constexpr, ALIGNED: constexpr, ROWS: constexpr
):
    """Elements of a tensor of float32 (0) or bfloat16 (1), as float32; zeros beyond its end.

    Args:
        address: of the tensor.
        at: number of the tile's first element.
        left: elements from there to the end.
        FORMAT: how they are kept.
        MASKED: whether the tile may reach beyond the end.
        ALIGNED: whether the tensor begins at a multiple of 16 bytes.
        ROWS: blocks in a tile.
    """
    place = places(ROWS)
    if FORMAT == 0:
        pointer = _pointer(address, tl.float32, ALIGNED)
        return _read(pointer, at + place, place < left, MASKED)
    else:
        pointer = _pointer(address, tl.int16, ALIGNED)
        return _widened(_read(pointer, at + place, place < left, MASKED))


@jit
def keep_plain(
    address, at, left, value, random, FORMAT: constexpr, CHANCE: constexpr, MASKED: constexpr,
    ALIGNED: constexpr, ROWS: constexpr,
):  # fmt: skip
    """Keeps elements in float32 or bfloat16; returns them as they are kept."""
    place = places(ROWS)
    if FORMAT == 0:
        pointer = _pointer(address, tl.float32, ALIGNED)
        _keep(pointer, at + place, value, place < left, MASKED)
        return value
    else:
        bits = _narrowed(value, random, CHANCE)
        pointer = _pointer(address, tl.int16, ALIGNED)
        _keep(pointer, at + place, bits, place < left, MASKED)
        return _widened(bits)


@jit
def random_bits(key, number):
    """The random bits of an element: `cruxy_exact.random_bits`."""
    x = (number ^ key) * -1640531535
    x = x ^ ((x >> 15) & 0x1FFFF)
    return x * -2073254261


@jit
def step_along(
    param, at, left, u, rate, decay, key_at, number,
    P: constexpr, P_CHANCE: constexpr, MASKED: constexpr, ALIGNED: constexpr, ROWS: constexpr,
):  # fmt: skip
    """`p <- p - rate (u + decay p)` of a tile, rounded by chance where that is asked for."""
    p = plain(param, at, left, P, MASKED, ALIGNED, ROWS)
    u = u + decay * p
    random = places(ROWS)
    if P_CHANCE:
        random = random_bits(tl.load(key_at), (number + at).to(tl.int32) + places(ROWS))
    keep_plain(param, at, left, p - rate * u, random, P, P_CHANCE, MASKED, ALIGNED, ROWS)


@jit
def _value(level, unit, SIGNED: constexpr, SHIFT: constexpr):
    """What a level stands for: `BlockCode.decode`."""
    if SIGNED:
        size = ((tl.abs(level) << SHIFT) + 0x40000000).to(tl.float32, bitcast=True)
        word = ((size - 2.0) * unit).to(tl.int32, bitcast=True)
        return (word ^ ((level >> 31) << 31)).to(tl.float32, bitcast=True)
    else:
        return ((level << SHIFT) + 0x3F800000).to(tl.float32, bitcast=True) * unit


@jit
def _level(x, factor, random, SIGNED: constexpr, SHIFT: constexpr, TOP: constexpr):
    """The level of a value: `BlockCode.encode`."""
    noise = (random >> (32 - SHIFT)) & ((1 << SHIFT) - 1)
    if SIGNED:
        size = tl.abs(x) * factor
        size = tl.where(size < TOP, size, TOP) + 2.0
        number = (size.to(tl.int32, bitcast=True) - 0x40000000 + noise) >> SHIFT
        sign = x.to(tl.int32, bitcast=True) >> 31
        return (number ^ sign) - sign
    else:
        size = x * factor
        size = tl.where(size < TOP, size, TOP)
        size = tl.where(size > 1.0, size, 1.0)
        return (size.to(tl.int32, bitcast=True) - 0x3F800000 + noise) >> SHIFT


@jit
def _scale(largest, LEAST: constexpr):
    """The scale of a block, from the bits of its largest magnitude: `BlockCode.scale`."""
    size = largest.to(tl.float32, bitcast=True)
    inside = tl.where(size < LEAST, LEAST, size)
    inside = tl.where(inside > 3.3895313892515355e38, 3.3895313892515355e38, inside)
    up = ((inside.to(tl.int32, bitcast=True) + 0xFFFF) >> 16) << 16
    word = tl.where(size < float("inf"), up, tl.where(size == size, largest, 0x7FC00000))
    return tl.where(size < 1.1754943508222875e-38, 0, word).to(tl.float32, bitcast=True)


@jit
def moment(
    address, scales, at, left,
    FORMAT: constexpr, SIGNED: constexpr, SHIFT: constexpr, TOP: constexpr,
    MASKED: constexpr, ALIGNED: constexpr, ROWS: constexpr,
):  # fmt: skip
    """Elements of a moment as float32: plain, or decoded from bytes (2) or nibbles (3)."""
    if FORMAT < 2:
        return plain(address, at, left, FORMAT, MASKED, ALIGNED, ROWS)
    else:
        row, place = tl.arange(0, ROWS)[:, None, None], places(ROWS)
        scale = _read(_pointer(scales, tl.int16, False), at // 256 + row, row * 256 < left, MASKED)
        unit = _widened(scale) * (1.0 / TOP)
        if FORMAT == 2:
            pointer = _pointer(address, tl.int8 if SIGNED else tl.uint8, ALIGNED)
            level = _read(pointer, at + place, place < left, MASKED).to(tl.int32)
        else:
            pointer = _pointer(address, tl.uint8, ALIGNED)
            byte = row * 128 + tl.arange(0, 128)[None, None, :]
            packed = _read(pointer, at // 2 + byte, row * 256 < left, MASKED).to(tl.int32)
            level = (packed >> (4 * tl.arange(0, 2)[None, :, None])) & 15
            if SIGNED:
                level = (level ^ 8) - 8
        value = _value(level, unit, SIGNED, SHIFT)
        return tl.where(place < left, value, 0.0)


@jit
def keep_moment(
    address, scales, at, left, value, random,
    FORMAT: constexpr, CHANCE: constexpr, SIGNED: constexpr, SHIFT: constexpr, TOP: constexpr,
    LEAST: constexpr, MASKED: constexpr, ALIGNED: constexpr, ROWS: constexpr,
):  # fmt: skip
    """Keeps elements of a moment, in its form; a block whose last elements are missing is whole."""
    if FORMAT < 2:
        keep_plain(address, at, left, value, random, FORMAT, CHANCE, MASKED, ALIGNED, ROWS)
    else:
        row, place = tl.arange(0, ROWS)[:, None, None], places(ROWS)
        size = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # in order, NaN last
        largest = tl.max(tl.max(size, axis=2, keep_dims=True), axis=1, keep_dims=True)
        scale = _scale(largest, LEAST)
        bits = _upper(scale.to(tl.int32, bitcast=True))
        _keep(_pointer(scales, tl.int16, False), at // 256 + row, bits, row * 256 < left, MASKED)
        fine = (scale > 0.0) & (scale < float("inf"))
        top = tl.full(scale.shape, TOP, tl.float32)
        factor = tl.where(fine, tl.div_rn(top, tl.where(fine, scale, 1.0)), 0.0)
        level = _level(value, factor, random, SIGNED, SHIFT, TOP)
        pointer = _pointer(address, tl.int8, ALIGNED)
        if FORMAT == 2:
            filled = place // 256 * 256 < left
            _keep(pointer, at + place, level.to(tl.int8), filled, MASKED)
        else:
            lifted = (level & 15) << (4 * tl.arange(0, 2)[None, :, None])
            packed = tl.sum(lifted, axis=1, keep_dims=True).to(tl.int8)
            byte = row * 128 + tl.arange(0, 128)[None, None, :]
            filled = byte // 128 * 256 < left
            _keep(pointer, at // 2 + byte, packed, filled, MASKED)


@jit
def power(a, gamma, POWER: constexpr):
    """`a^gamma` of non-negative `a`: of 1.5 (0), of 2 (1), of any other (2)."""
    if POWER == 0:
        return a * tl.sqrt_rn(a)
    elif POWER == 1:
        return a * a
    else:
        return tl.exp2(tl.log2(a) * gamma)
