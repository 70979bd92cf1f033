"""How a source that `triton_tape` has written becomes a kernel, and what it may call."""

import linecache
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

from cruxy_torch._native.triton_kernels import jit, tl


class NotRecordedError(Exception):
    """What was asked for cannot be written as a kernel."""


def lanes(length: int) -> int:
    """The smallest power of two that is not below a length, at least 2."""
    return max(2, 1 << (length - 1).bit_length())


def literal(value: float) -> str:
    """A number as a source has it, in float32.

    Raises:
        NotRecordedError: where that has it as a denormal number alone, or not at all.
    """
    if not math.isfinite(value):
        return f'float("{value}")'
    try:
        single = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError as error:
        raise NotRecordedError(f"{value} does not fit into float32") from error
    if single and abs(single) < 2.0**-126:
        raise NotRecordedError(f"{value} is less than float32 has")
    return repr(single)


@jit
def exponential(x):
    """`exp(x)`, rounded once."""
    return tl.exp(x.to(tl.float64)).to(tl.float32)


@jit
def tangent(x):
    """`tanh(x)`, rounded once; small ones by their series, of which `exp` would leave little."""
    wide = x.to(tl.float64)
    inside = tl.where(tl.abs(wide) < 20.0, wide, 0.0)
    e = tl.exp(2.0 * inside)
    far = tl.where(wide > 0.0, 1.0, tl.where(wide < 0.0, -1.0, wide))
    large = tl.where(tl.abs(wide) < 20.0, (e - 1.0) / (e + 1.0), far)
    small = wide - wide * wide * wide / 3.0
    return tl.where(tl.abs(wide) < 1e-4, small, large).to(tl.float32)


@jit
def power(x, exponent):
    """`x^exponent` of `x` that is not negative, rounded once."""
    wide = x.to(tl.float64)
    some = wide > 0.0
    root = tl.exp(exponent * tl.log(tl.where(some, wide, 1.0)))
    return tl.where(some, root, wide).to(tl.float32)


@jit
def total(x, inside):
    """The sum of the lanes that there are."""
    return tl.sum(tl.where(inside, x, 0.0), axis=0)


@jit
def largest(x, inside):
    """The largest of the lanes that there are; NaN where one is."""
    found = tl.max(tl.where(inside & (x == x), x, float("-inf")), axis=0)
    lost = tl.max((inside & (x != x)).to(tl.int32), axis=0)
    return tl.where(lost != 0, float("nan"), found)


_HELPERS = {
    "exponential": exponential, "tangent": tangent, "power": power, "total": total,
    "largest": largest,
}  # fmt: skip
"""What a source may call."""


def compiled(source: str, name: str, plain: Sequence[str] = ()) -> Any:
    """A kernel of a source.

    Args:
        source: from `Tape.source`.
        name: of the function in it.
        plain: arguments for whose values no other kernel is to be compiled.
    """
    place = f"<{name} {hash(source) & 0xFFFFFFFF:08x}>"
    linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
    space: dict[str, Any] = {"__name__": __name__, "tl": tl, **_HELPERS}
    exec(compile(source, place, "exec"), space)
    function = space[name]
    if not plain:
        return jit(function)
    specialized: Callable[..., Any] = jit  # `triton.jit` with options
    return specialized(do_not_specialize=list(plain))(function)
