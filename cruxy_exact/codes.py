"""Low-bit codes for optimizer state: 8 or 4 bits an element and one bfloat16 scale a block.

Written once for `numpy`, `jax.numpy` and `torch`, which come as `xp`. The same float32 input gives
the same codes in each, compiled or not: rounding is integer arithmetic on the bits of a float32,
and no product is added to anything, which compilers may contract into one rounding.
"""

import dataclasses
import math
import struct
from typing import Any

from cruxy_exact._namespace import cast
from cruxy_exact.rounding import RoundedByChance, quotient

TINY = 2.0**-126
"""The smallest normal float32. Anything below may count as 0, as it does where XLA computes."""

_LARGEST = (2.0 - 2.0**-7) * 2.0**127
"""The largest bfloat16."""


@dataclasses.dataclass(frozen=True)
class BlockCode(RoundedByChance):
    r"""How the numbers of one block share a scale $s$, the largest magnitude among them.

    A number is scaled to $T = |x| \, t_n / s$ and companded by reading the bits of a float32 as an
    integer, which is a logarithm made of straight pieces: the code is the exponent and the first
    $m$ bits of the mantissa of

    - **signed** (momentum): $1 + T$, so that steps are even near zero and grow with the value. The
      levels are $\pm s \, t_k / t_n$ with $t_k = 2^{\lfloor k / 2^m \rfloor} (1 + (k \bmod 2^m) /
      2^m) - 1$, $k = 0 \dots n$; $n = 127$, $m = 5$ for 8 bits, $n = 7$, $m = 2$ for 4. These are
      0, .1, .2, .3, .4, .6, .8, 1 of the scale, beside 0, .08, .17, .27, .4, .56, .75, 1 of the
      softsign of FlashOptim ([arXiv 2602.23349](https://arxiv.org/abs/2602.23349)).
    - **non-negative** (second moments): $\max(T, 1)$, so that steps are even in relative terms
      down to $s / t_n$, with $t_k$ as above but for the $-1$; $n = 255$, $m = 4$ for 8 bits,
      $n = 15$, $m = 1$ for 4. The range is that of the square-root code of as many bits. There is
      no zero: a second moment that becomes zero beside a gradient that is not makes Adam diverge
      (4-bit states, [arXiv 2309.01507](https://arxiv.org/abs/2309.01507)). A value below the
      smallest level takes it, and a negative one does too. Only a block of zeros alone, whose
      scale is 0, decodes to zeros.

    Between two levels the code is linear, so adding random bits below the last one kept and cutting
    off rounds up with the probability that makes the mean of what is decoded the value itself (not
    so below the smallest level of the non-negative code). Companding by a root or a quotient needs
    a second formula for that, and one that every library rounds alike.

    A block in which anything is not finite has a scale that is not, and decodes to NaN or infinity
    everywhere: nothing hides in a code.

    Attributes:
        bits: bits an element, 8 or 4.
        signed: whether values have a sign.

    Raises:
        ValueError: where `bits` is neither 8 nor 4.

    Examples:
        >>> import numpy as np
        >>> code = BlockCode(bits=4, signed=True)
        >>> x = np.array([0.0, 0.12, -0.5, 1.0], np.float32)
        >>> scale = code.scale(np.max(np.abs(x)), xp=np)
        >>> codes = code.encode(x, scale, code.half, xp=np)
        >>> print(codes)
        [ 0  1 11  7]
        >>> print(code.decode(codes, scale, xp=np).round(3))
        [ 0.   0.1 -0.6  1. ]
    """

    bits: int
    signed: bool

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise ValueError(f"bits must be 8 or 4, got {self.bits!r}; use 8 where memory allows.")

    @property
    def levels(self) -> int:
        """`n`, the largest code of a non-negative value."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def mantissa(self) -> int:
        """`m`, the bits of the mantissa that are kept."""
        return {(8, True): 5, (4, True): 2, (8, False): 4, (4, False): 1}[self.bits, self.signed]

    @property
    def origin(self) -> float:
        """What 1 in the formulas above is: 2 in the signed code.

        In units of 1, the largest float32 over the `t_n` of 4 bits would need a denormal factor.
        """
        return 2.0 if self.signed else 1.0

    @property
    def top(self) -> float:
        """`t_n`, what the scale is scaled to, in units of `origin`."""
        word = struct.pack("<i", self._origin_bits + (self.levels << self._shift))
        return struct.unpack("<f", word)[0] - (self.origin if self.signed else 0.0)

    @property
    def _origin_bits(self) -> int:
        return struct.unpack("<i", struct.pack("<f", self.origin))[0]

    @property
    def _shift(self) -> int:
        return 23 - self.mantissa

    def scale(self, largest: Any, *, xp: Any) -> Any:
        """The scale of a block.

        Args:
            largest: the largest magnitude in the block; any shape and floating dtype. A maximum
                that does not pass NaN on would hide it.
            xp: the array namespace.

        Returns:
            float32 of the same shape that bfloat16 holds exactly: `largest` rounded up, but at
            least `TINY * top * 2^m`, so that the smallest level is no denormal, and 0 where
            `largest` is below `TINY`. Not rounded up to infinity: what is above the largest
            bfloat16 is less than half a step above it.
        """
        largest = cast(largest, xp.float32)
        least = TINY * self.top * 2**self.mantissa
        number = xp.clip(largest, least, _LARGEST)
        up = ((number.view(xp.int32) + 0xFFFF) & -0x10000).view(xp.float32)
        return xp.where(largest < TINY, 0.0, xp.where(xp.isfinite(largest), up, largest))

    def encode(self, x: Any, scale: Any, noise: Any, *, xp: Any) -> Any:
        """The codes of the elements of one or more blocks.

        Args:
            x: values; any shape and floating dtype, cast to float32.
            scale: from `scale`, broadcast against `x`. Magnitudes above it are taken as equal.
            noise: `half` for the nearest level, `noise(...)` for stochastic rounding; broadcast
                against `x`.
            xp: the array namespace.

        Returns:
            Codes of the shape of `x`: int8 or, non-negative, uint8; for 4 bits the numbers 0 to 15
            as uint8, for `pack` (negative ones as two's complement). In a block that is not finite
            or all zero they carry nothing.
        """
        x = cast(x, xp.float32)
        # 0 in a block whose scale is not finite: a division per block, not per element.
        usable = xp.where((scale > 0.0) & (scale < math.inf), scale, math.inf)
        factor = quotient(self.top, usable, xp=xp)
        size = (xp.abs(x) if self.signed else x) * factor
        # Also where the size is NaN, and where a compiler that computes x twice, for the scale and
        # here, comes out an ulp above.
        size = xp.where(size < self.top, size, self.top)
        size = size + self.origin if self.signed else xp.where(size > 1.0, size, 1.0)
        number = (cast(size, xp.float32).view(xp.int32) - self._origin_bits + noise) >> self._shift
        if self.signed:
            sign = x.view(xp.int32) >> 31  # -1 or 0, and so two's complement
            number = (number ^ sign) - sign
        if self.bits == 4:
            return cast(number & 15, xp.uint8)
        return cast(number, xp.int8 if self.signed else xp.uint8)

    def decode(self, codes: Any, scale: Any, *, xp: Any) -> Any:
        """The values that the codes stand for.

        Args:
            codes: from `encode`, for 4 bits unpacked.
            scale: of their blocks, broadcast against `codes`.
            xp: the array namespace.

        Returns:
            float32 of the shape of `codes`.
        """
        unit = scale * (1.0 / self.top)
        number = cast(codes, xp.int32)
        if self.signed and self.bits == 4:
            number = (number ^ 8) - 8
        size = ((xp.abs(number) << self._shift) + self._origin_bits).view(xp.float32)
        if not self.signed:
            return size * unit
        size = ((size - self.origin) * unit).view(xp.int32)
        return (size ^ (number & -0x80000000)).view(xp.float32)

    def error_bound(self, x: Any, scale: Any, *, stochastic: bool, xp: Any) -> Any:
        r"""The largest possible difference between a value and what its code decodes to.

        The step around $V = 1 + T$ or $T$ is at most $2^{-m} V$. Nearest rounding errs by half a
        step, stochastic rounding by a whole one: in terms of the value by $2^{-m} (|x| + s / t_n)$
        for the signed code and $2^{-m} |x|$ for the other, or half that. Below the smallest
        non-negative level the error is the distance to it. Float32 arithmetic adds at most
        5 roundings of $|x| + s / t_n$, and `TINY`.

        Args:
            x: values, finite.
            scale: of their blocks, broadcast against `x`.
            stochastic: whether rounding was.
            xp: the array namespace.

        Returns:
            float32 of the shape of `x`.
        """
        size, unit = xp.abs(cast(x, xp.float32)), scale * (self.origin / self.top)
        part = 2.0**-self.mantissa if stochastic else 0.5 * 2.0**-self.mantissa
        error = part * size + part * unit if self.signed else part * size
        if not self.signed:
            error = xp.where(unit - size > error, unit - size, error)
        return error + 5 * 2.0**-24 * size + 5 * 2.0**-24 * unit + TINY


def pack(low: Any, high: Any) -> Any:
    """Two 4-bit codes to a byte.

    Args:
        low: codes for the lower half of each byte; uint8, any shape.
        high: codes for the upper half; uint8, the same shape.

    Returns:
        uint8 of the same shape.
    """
    return lifted(low, 0) | lifted(high, 1)


def unpack(packed: Any) -> tuple[Any, Any]:
    """The two 4-bit codes in each byte: what `pack` was given."""
    return nibble(packed, 0), nibble(packed, 1)


def lifted(codes: Any, half: Any) -> Any:
    """4-bit codes in their half of a byte, whose other half is 0.

    Args:
        codes: uint8.
        half: 0 for the lower, 1 for the upper; a number or uint8, broadcast against `codes`.
    """
    return codes << (4 * half)


def nibble(packed: Any, half: Any) -> Any:
    """The 4-bit codes in one half of each byte; arguments as of `lifted`."""
    return (packed >> (4 * half)) & 15
