"""What the codes have in common: rounding by chance, and a quotient of a block."""

import math
from typing import Any

from cruxy_exact._namespace import cast, is_jax


def quotient(number: float, scale: Any, *, xp: Any) -> Any:
    """`number / scale`, correctly rounded; 0 where the scale is infinite.

    XLA on a GPU divides float32 numbers with an error of up to 2 units in the last place. In JAX
    the remainder says by how many: with a scale of so few bits it is exact, contracted or not.

    Args:
        number: of at most 8 significant bits, at least 1.
        scale: positive normal float32 that bfloat16 holds exactly, or infinity; any shape. The
            quotient has to be a normal float32 too: in JAX any other means nothing.
        xp: the array namespace.

    Returns:
        float32 of the shape of `scale`.
    """
    # Of two arrays: where a number is divided, PyTorch multiplies by the reciprocal.
    if not is_jax(xp):
        return xp.full_like(scale, number) / scale
    word = scale.view(xp.int32)
    mantissa = ((word & 0x7FFFFF) | 0x3F800000).view(xp.float32)
    found = (xp.full_like(mantissa, number) / mantissa).view(xp.int32)
    high = (found & -0x10000).view(xp.float32)
    rest = (number - high * mantissa) - (found.view(xp.float32) - high) * mantissa
    unit = ((found & 0x7F800000) - (23 << 23)).view(xp.float32)
    half = 0.5 * unit * mantissa
    for k in (1.0, 3.0):
        found = found + cast(rest > k * half, xp.int32) - cast(rest < -k * half, xp.int32)
    found = found - ((word & 0x7F800000) - 0x3F800000)
    return xp.where(scale < math.inf, found.view(xp.float32), 0.0)


class RoundedByChance:
    """A code whose levels are told apart above `_shift` bits of a float32's mantissa."""

    @property
    def _shift(self) -> int:
        """Bits behind the point of a level."""
        raise TypeError(f"{type(self).__name__} must say how many bits are rounded away.")

    @property
    def half(self) -> int:
        """As `noise`, rounds to the nearest level."""
        return 1 << (self._shift - 1)

    def noise(self, bits: Any) -> Any:
        """Random bits as `noise` for stochastic rounding.

        Args:
            bits: from `cruxy_exact.random_bits.random_bits`; int32, any shape.

        Returns:
            int32 of the same shape.
        """
        return (bits >> (32 - self._shift)) & ((1 << self._shift) - 1)
