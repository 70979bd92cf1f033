"""How far apart a step's scalars may be when a kernel and when the reference computes them.

The source of the kernel is run here on numbers that carry a bound. Sums, products and quotients of
two numbers are rounded as IEEE says by both, so that equal arguments give equal results. What
differs at first is a sum over a vector, which each takes in its own order, and roots, `exp`, `tanh`
and powers, which the kernel rounds once and the reference has from a library. On a GPU PyTorch also
makes a quotient with a number a product with the reciprocal. From there every operation hands the
difference on, and rounds twice: once in each of the two.
"""

import math
from typing import Any

import numpy as np

from triton_cases import INTERPRETED

UNIT = 2.0**-24
"""What rounding changes a number by at most, relatively."""

ONCE = 1.02 * UNIT
"""Of a function that is computed in float64 and rounded once."""

LIBRARY = {"exp": 2.52, "tanh": 4.0, "power": 1.0 if INTERPRETED else 4.0, "sqrt": 1.0}
"""Units of the last place within which libraries have their functions: NumPy's for the first two,
C's for powers and CUDA's on a GPU. PyTorch's roots on a CPU are not always the nearest number."""

RECIPROCAL = not INTERPRETED
"""Whether the reference has quotients of a number as products with the reciprocal."""


class Near:
    """A number or a vector as the kernel has it, and how far the reference's may be from it.

    Of a truth value the bound says whether it may be the other one.
    """

    plain = False
    """Whether the reference has a plain number here."""

    def __init__(self, value: Any, off: Any = 0.0) -> None:
        self.value = np.asarray(value)
        self.off = np.broadcast_to(np.asarray(off, np.float64), self.value.shape)

    def to(self, kind: Any) -> "Near":
        value = self.value.astype(kind)
        counts = self.value.dtype == np.int32 and kind == np.float32
        # NumPy goes on in float64 from a quotient of counts.
        return Near(value, UNIT * np.abs(value) if counts else self.off)

    def __add__(self, other: Any) -> "Near":
        other = near(other)
        return rounded(self.value + other.value, self.off + other.off)

    def __sub__(self, other: Any) -> "Near":
        other = near(other)
        return rounded(self.value - other.value, self.off + other.off)

    def __mul__(self, other: Any) -> "Near":
        other = near(other)
        off = size(self) * other.off + size(other) * self.off + self.off * other.off
        return rounded(self.value * other.value, off)

    def __mod__(self, other: Any) -> "Near":
        return Near(self.value % near(other).value)

    def __rshift__(self, bits: Any) -> "Near":
        return Near(self.value >> near(bits).value)

    def __and__(self, other: Any) -> "Near":
        other = near(other)
        return Near(self.value & other.value, np.maximum(self.off, other.off))

    def __or__(self, other: Any) -> "Near":
        other = near(other)
        return Near(self.value | other.value, np.maximum(self.off, other.off))

    def __xor__(self, other: Any) -> "Near":
        other = near(other)
        return Near(self.value ^ other.value, np.maximum(self.off, other.off))

    def __invert__(self) -> "Near":
        return Near(~self.value, self.off)

    def __neg__(self) -> "Near":
        return Near(-self.value, self.off)

    def __lt__(self, other: Any) -> "Near":
        return self._compared(other, np.less)

    def __le__(self, other: Any) -> "Near":
        return self._compared(other, np.less_equal)

    def __gt__(self, other: Any) -> "Near":
        return self._compared(other, np.greater)

    def __ge__(self, other: Any) -> "Near":
        return self._compared(other, np.greater_equal)

    def __eq__(self, other: object) -> Any:
        return self._compared(other, np.equal)

    def __ne__(self, other: object) -> Any:
        return self._compared(other, np.not_equal)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def _compared(self, other: Any, how: Any) -> "Near":
        other = near(other)
        off = self.off + other.off if other is not self else 0.0 * self.off  # whether it is NaN
        apart = np.abs(self.value.astype(np.float64) - other.value.astype(np.float64))
        return Near(how(self.value, other.value), (off > 0.0) & (apart <= off))


class Pointer:
    """Where a tensor lies, from an element on."""

    def __init__(self, array: np.ndarray, kept: dict[Any, Near], name: str, at: Any = 0) -> None:
        self.array, self.kept, self.name, self.at = array.reshape(-1), kept, name, at

    def __add__(self, at: Any) -> "Pointer":
        return Pointer(self.array, self.kept, self.name, self.at + near(at).value)


class Language:
    """What a kernel of scalars calls of `triton.language`."""

    float32, float64, int32, uint8, int1 = (
        np.float32, np.float64, np.int32, np.uint8, np.bool_
    )  # fmt: skip

    @staticmethod
    def load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> Near:
        if mask is None:
            return Near(pointer.array[pointer.at])
        inside = mask.value & (pointer.at < len(pointer.array))
        found = pointer.array[np.where(inside, pointer.at, 0)]
        return Near(np.where(inside, found, np.asarray(other, found.dtype)))

    @staticmethod
    def store(pointer: Pointer, value: Near, mask: Any = None) -> None:
        inside = np.ones_like(pointer.at, bool) if mask is None else mask.value
        for at, here in np.ndenumerate(np.broadcast_to(inside, value.value.shape)):
            if here:
                place = int(np.broadcast_to(pointer.at, value.value.shape)[at])
                pointer.kept[pointer.name, place] = Near(value.value[at], value.off[at])

    @staticmethod
    def arange(begin: int, end: int) -> Near:
        return Near(np.arange(begin, end, dtype=np.int32))

    @staticmethod
    def full(shape: tuple[int, ...], value: float, kind: Any) -> Near:
        found = Near(np.full(shape, value, kind))
        found.plain = not shape
        return found

    @staticmethod
    def where(condition: Near, x: Any, y: Any) -> Near:
        x, y = near(x), near(y)
        off = np.where(condition.value, x.off, y.off)
        either = np.maximum(x.off, y.off) + np.abs(x.value * 1.0 - y.value)
        off = np.where(condition.off > 0.0, either, off)
        return Near(np.where(condition.value, x.value, y.value), off)

    @staticmethod
    def abs(x: Near) -> Near:
        return Near(np.abs(x.value), x.off)

    @staticmethod
    def sqrt_rn(x: Near) -> Near:
        return function(np.sqrt, x, library=LIBRARY["sqrt"])

    @staticmethod
    def div_rn(x: Near, y: Near) -> Near:
        value = x.value / y.value
        left = size(y) - y.off
        with np.errstate(divide="ignore"):
            off = (x.off + np.abs(value.astype(np.float64)) * y.off) / np.where(left > 0, left, 0.0)
        off = np.where(x.off + y.off > 0.0, off, 0.0)
        # Of 2^k it makes no difference.
        if RECIPROCAL and any(z.plain and abs(np.frexp(z.value)[0]) != 0.5 for z in (x, y)):
            off = off + UNIT * np.abs(value.astype(np.float64))
        return rounded(value, off)

    @staticmethod
    def debug_barrier() -> None:
        pass


def near(x: Any) -> Near:
    """A plain number in the place of one with a bound."""
    return x if isinstance(x, Near) else Near(x)


def size(x: Near) -> np.ndarray:
    """Magnitudes in float64."""
    return np.abs(x.value.astype(np.float64))


def rounded(value: np.ndarray, off: np.ndarray) -> Near:
    """A result that both have rounded; equal arguments give equal ones."""
    each = 2.0 * UNIT * np.abs(value.astype(np.float64)) if value.dtype == np.float32 else 0.0
    return Near(value, np.where(off > 0.0, off + each, 0.0))


def moved(function: Any, x: Near) -> np.ndarray:
    """What a rising or falling function makes of the bound of its argument."""
    wide = x.value.astype(np.float64)
    middle, least = function(wide), np.where(wide >= 0.0, 0.0, -np.inf)
    ends = (function(wide + x.off), function(np.maximum(wide - x.off, least)))
    return np.where(x.off > 0.0, np.maximum(*(np.abs(end - middle) for end in ends)), 0.0)


def function(of: Any, x: Near, *, library: float) -> Near:
    """What the kernel rounds once, and a library within so many units of the last place."""
    value = of(x.value.astype(np.float64))
    off = moved(of, x) + (ONCE + 2.0 * UNIT * library) * np.abs(value)
    return Near(value.astype(np.float32), off)


def exponential(x: Near) -> Near:
    """`exp(x)`."""
    return function(np.exp, x, library=LIBRARY["exp"])


def tangent(x: Near) -> Near:
    """`tanh(x)`."""
    value = np.tanh(x.value.astype(np.float64))
    off = x.off + (ONCE + 2.0 * UNIT * LIBRARY["tanh"]) * np.abs(value)
    return Near(value.astype(np.float32), off)


def power(x: Near, exponent: Near) -> Near:
    """`x^exponent`; the reference may have the exponent in float32."""
    wide = float(exponent.value)
    found = function(lambda y: np.power(y, wide), x, library=LIBRARY["power"])
    some = np.where(x.value > 0.0, x.value.astype(np.float64), 1.0)
    return Near(found.value, found.off + UNIT * wide * np.abs(np.log(some)) * size(found))


def total(x: Near, inside: Near) -> Near:
    """The sum of the lanes that there are: of one in their order, of the other in pairs."""
    terms = np.where(inside.value, x.value, 0).astype(np.float64)
    count = int(inside.value.sum())
    deep = math.ceil(math.log2(len(terms))) + max(0, count - 1)
    whole = (terms == np.round(terms)).all() and not x.off.any()  # small whole numbers add exactly
    off = 0.0 if whole else deep * UNIT * np.abs(terms).sum()
    lost = np.where(inside.value, x.off, 0.0).sum()
    return Near(np.float32(terms.sum()), lost + off)


def largest(x: Near, inside: Near) -> Near:
    """The largest of the lanes that there are."""
    found = x.value[inside.value]
    return Near(found.max(), x.off[inside.value].max())


def bounds(source: str, arguments: dict[str, Any]) -> dict[tuple[str, int], Near]:
    """What a kernel of scalars writes, by the argument and the place, with its bounds.

    Args:
        source: of the kernel `decide`.
        arguments: by name arrays, and numbers.
    """
    kept: dict[tuple[str, int], Near] = {}
    space: dict[str, Any] = {
        "tl": Language, "exponential": exponential, "tangent": tangent, "power": power,
        "total": total, "largest": largest,
    }  # fmt: skip
    exec(source, space)
    given = {name: _given(name, x, kept) for name, x in arguments.items()}
    with np.errstate(all="ignore"):
        space["decide"](**given)
    return kept


def _given(name: str, x: Any, kept: dict[tuple[str, int], Near]) -> Any:
    if isinstance(x, np.ndarray):
        return Pointer(x, kept, name)
    if isinstance(x, int):
        return Near(np.int32(x))
    return Near(np.float32(x), UNIT * abs(x))  # the reference may have a plain number in float64
