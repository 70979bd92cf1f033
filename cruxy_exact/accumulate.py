"""Gradients added up over micro-batches and devices in any order: integers on an absolute grid.

A batch is cut into grains, each of a fixed number of samples. A grain's gradient depends on nothing
else, and `push` and `merge` add grains so that neither their order nor how they are spread over
calls and devices can matter. The bins of the grid lie 30 bits apart; a tensor keeps the two that
hold its largest value so far and what is next (after ReproBLAS, in integers). The loss has to be a
sum over the samples of a grain, not a mean: divide by the count after `value`.

In JAX inside `jax.enable_x64(True)`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from cruxy_exact._namespace import cast, largest
from cruxy_exact.arithmetic import down, field, power64, up

BIN = 30
"""Bits from one bin to the next; the unit of bin `j` is `2^(30 j - 150)`."""
LOST = 10
"""The bin of a tensor in which something was not finite: none that is comes so high."""


class Grains(NamedTuple):
    """The exact sum of grains of one tensor so far.

    Attributes:
        high: in units of bin `bin`; int64, of the shape of the tensor.
        low: in units of the bin below; the same.
        bin: int32, `(1,)`.
    """

    high: Any
    low: Any
    bin: Any


def empty(like: Any, *, xp: Any) -> Grains:
    """The sum of no grains, of the shape of `like`."""
    nothing = xp.zeros_like(like, dtype=xp.int64)
    return Grains(nothing, nothing, xp.zeros_like(_peak(like, xp), dtype=xp.int32))


def push(grains: Grains, g: Any, *, xp: Any) -> Grains:
    """The sum with one more grain.

    Args:
        grains: the sum so far. At most `2^33` grains fit.
        g: float32, settled.
        xp: the array namespace.
    """
    e = field(_peak(g, xp), xp=xp)
    place = (e - 5 + (BIN - 1)) // BIN
    place = xp.where(place > grains.bin, place, grains.bin)
    high, low, _ = raised(grains, place, xp=xp)
    shape = [1] * g.ndim
    x = up(g, xp=xp)
    unit = power64(place * BIN - 150, xp=xp).reshape(shape)
    q = xp.round(x * power64(150 - place * BIN, xp=xp).reshape(shape))
    left = x - q * unit  # exact: a multiple of the last place of x
    p = xp.round(left * power64(150 + BIN - place * BIN, xp=xp).reshape(shape))
    lost = (e >= 255).reshape(shape)
    q, p = (xp.where(lost, xp.zeros_like(part), part) for part in (q, p))
    place = xp.where(e >= 255, xp.full_like(place, LOST), place)
    return Grains(high + cast(q, xp.int64), low + cast(p, xp.int64), place)


def raised(grains: Grains, place: Any, *, xp: Any) -> Grains:
    """The same sum for a bin that is not below its own; what falls below the two bins is dropped.

    Devices add their sums so: the largest `bin` of all, `raised` to it, and the integers added.
    """
    rise = (place - grains.bin).reshape([1] * grains.high.ndim)
    zero = xp.zeros_like(grains.high)
    high = xp.where(rise == 0, grains.high, zero)
    return Grains(
        high, xp.where(rise == 0, grains.low, xp.where(rise == 1, grains.high, zero)), place
    )


def merge(parts: Sequence[Grains], *, xp: Any) -> Grains:
    """The sum of sums, one or more."""
    first, *others = parts
    place = first.bin
    for part in others:
        place = xp.where(part.bin > place, part.bin, place)
    high, low, _ = raised(first, place, xp=xp)
    for part in others:
        part = raised(part, place, xp=xp)
        high, low = high + part.high, low + part.low
    return Grains(high, low, place)


def value(grains: Grains, *, xp: Any) -> Any:
    """The sum in float32, rounded once; NaN where anything was not finite.

    It is at most `n max|x| 2^-30 + 2^-24 |sum|` off.
    """
    shape = [1] * grains.high.ndim
    high = up(grains.high, xp=xp) * power64(grains.bin * BIN - 150, xp=xp).reshape(shape)
    below = power64((grains.bin - 1) * BIN - 150, xp=xp).reshape(shape)
    out = high + up(grains.low, xp=xp) * below  # both products are exact: powers of two
    out = xp.where((grains.bin >= LOST).reshape(shape), xp.full_like(out, math.nan), out)
    return down(out, xp=xp)


def _peak(g: Any, xp: Any) -> Any:
    return largest(xp.abs(g).reshape(-1), 0, xp=xp)
