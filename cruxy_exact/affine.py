"""A code for activations: 8 or 4 bits an element, an offset and a step for every 256.

Written once for `numpy`, `jax.numpy` and `torch`, which come as `xp`, with the same bits in each:
see `cruxy_exact.codes`. A symmetric code wastes half its levels on values of one sign, as they are
after a GELU or a softmax.
"""

import dataclasses
import math
from typing import Any

from cruxy_exact._namespace import cast
from cruxy_exact.rounding import RoundedByChance, quotient

GROUP = 256
"""Elements that share an offset and a step: consecutive ones, in row-major order."""

LEAST = 2.0**-118
"""The smallest step, and the smallest offset beside 0: all they decode to is then no denormal."""


@dataclasses.dataclass(frozen=True)
class AffineCode(RoundedByChance):
    r"""How the numbers of one group share an offset $o$ and a step $s$.

    $$
    q = \Big\lfloor \frac{x - o}{s} + u \Big\rfloor \in \{0 \dots n\}, \qquad
    \hat x = o + q\,s, \qquad n = 2^{bits} - 1
    $$

    With $u$ drawn evenly from $[0, 1)$ the mean of $\hat x$ is $x$; with $u = 1/2$ it is the
    nearest level. Both $o$ and $s$ are bfloat16, the smallest value rounded down and the width over
    $n$ rounded up, **before** anything is coded: what decodes is what encoded. An offset that is
    rounded after coding moves the whole group, and no average takes that away.

    The product $q s$ of a code and a bfloat16 has 16 bits and is exact, so that one rounding is
    left whether or not a compiler contracts it with the sum.

    A group in which anything is not finite, or which is wider than the largest float32, decodes to
    NaN everywhere: nothing hides in a code.

    Attributes:
        bits: bits an element, 8 or 4.

    Raises:
        ValueError: where `bits` is neither 8 nor 4.

    Examples:
        >>> import numpy as np
        >>> code = AffineCode(bits=4)
        >>> x = np.array([0.0, 0.12, 0.5, 1.5], np.float32)
        >>> offset, step = code.offset_and_step(x.min(), x.max(), xp=np)
        >>> codes = code.encode(x, offset, step, code.half, xp=np)
        >>> print(codes)
        [ 0  1  5 15]
        >>> print(code.decode(codes, offset, step, xp=np).round(3))
        [0.    0.1   0.5   1.501]

    References:
        Chen et al., [ActNN: Reducing Training Memory Footprint via 2-Bit Activation Compressed
        Training](https://arxiv.org/abs/2104.14129), 2021.
    """

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise ValueError(f"bits must be 8 or 4, got {self.bits!r}; use 8 where memory allows.")

    @property
    def levels(self) -> int:
        """`n`, the largest code."""
        return 2**self.bits - 1

    @property
    def _shift(self) -> int:
        """Bits behind the point, where `origin + q` has its point."""
        return 23 - self.bits

    @property
    def _origin(self) -> float:
        """Added to what is coded, so that its exponent is the same for every code."""
        return float(2**self.bits)

    @property
    def _origin_bits(self) -> int:
        return (127 + self.bits) << 23

    def offset_and_step(self, lowest: Any, highest: Any, *, xp: Any) -> tuple[Any, Any]:
        """The offset and the step of a group.

        Args:
            lowest: the smallest value in the group; any shape and floating dtype. A minimum that
                does not pass NaN on would hide it.
            highest: the largest, of the same shape.
            xp: the array namespace.

        Returns:
            Two of float32 and the same shape, which bfloat16 holds exactly; the offset is NaN where
            the group is not finite.
        """
        lowest, highest = cast(lowest, xp.float32), cast(highest, xp.float32)
        word = lowest.view(xp.int32)
        # Down: of a negative number the magnitude goes up.
        offset = ((word + ((word >> 31) & 0xFFFF)) & -0x10000).view(xp.float32)
        offset = xp.where(xp.abs(lowest) < LEAST, xp.where(lowest < 0.0, -LEAST, 0.0), offset)
        offset = cast(offset, xp.float32)
        width = highest - offset
        # A little more than the quotient, by which the largest value would not always be reached.
        step = width * ((1.0 + 2.0**-20) / self.levels)
        known = xp.isfinite(width)
        step = cast(xp.where(known & (step > LEAST), step, LEAST), xp.float32)
        step = ((step.view(xp.int32) + 0xFFFF) & -0x10000).view(xp.float32)
        return cast(xp.where(known, offset, math.nan), xp.float32), step

    def encode(self, x: Any, offset: Any, step: Any, noise: Any, *, xp: Any) -> Any:
        """The codes of the elements of one or more groups.

        Args:
            x: values; any shape and floating dtype, cast to float32.
            offset: from `offset_and_step`, broadcast against `x`.
            step: likewise.
            noise: `half` for the nearest level, `noise(...)` for stochastic rounding; broadcast
                against `x`.
            xp: the array namespace.

        Returns:
            uint8 of the shape of `x`, 0 to `levels`, for 4 bits to be packed. In a group that is
            not finite they carry nothing.
        """
        size = (cast(x, xp.float32) - offset) * quotient(1.0, step, xp=xp)
        # Also where it is NaN, and where a compiler that computes x twice comes out an ulp above.
        size = xp.where(size < float(self.levels), size, float(self.levels))
        size = xp.where(size > 0.0, size, 0.0) + self._origin
        number = cast(size, xp.float32).view(xp.int32) - self._origin_bits + noise
        return cast(number >> self._shift, xp.uint8)

    def decode(self, codes: Any, offset: Any, step: Any, *, xp: Any) -> Any:
        """The values that the codes stand for.

        Args:
            codes: from `encode`, for 4 bits unpacked.
            offset: of their groups, broadcast against `codes`.
            step: likewise.
            xp: the array namespace.

        Returns:
            float32 of the shape of `codes`.
        """
        return cast(codes, xp.float32) * step + offset
