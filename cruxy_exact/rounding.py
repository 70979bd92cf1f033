"""What codes that round by chance have in common."""

from typing import Any


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
