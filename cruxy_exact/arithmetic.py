"""Elementwise float32 arithmetic with the same bits under every compiler and denormal mode.

Every array is float32. Functions take the array namespace as `xp` (`numpy`, `jax.numpy`, `torch`).
In JAX they need 64-bit types: call them inside `jax.enable_x64(True)`.

Three rules make the bits the same:

- Everything an operation returns has gone through `settle`, and every product has before it is
  added to anything. The select in it keeps a compiler from contracting `a * b + c` to a fused
  multiply-add, and makes it irrelevant whether denormal numbers are kept.
- Divisions and roots go through float64. A float64 quotient or root that is off by up to 3 units in
  its last place still rounds to the right float32. A compiler that sees this rounding divides in
  float32 in the first place, which on a GPU is 2 units off: `opaque` hides it.
- Constants are rounded to float32 on the host (`f32`). Nothing is divided by a constant.
"""

import math
import struct
from typing import Any

from cruxy_exact._namespace import cast, is_jax, is_torch

TINY = 2.0**-125
"""What is not larger than this counts as 0. Twice the smallest normal float32, so that it does not
matter whether a denormal result is found before or after rounding."""


def f32(number: float) -> float:
    """A Python number rounded to the nearest float32.

    Raises:
        OverflowError: where it is too large for a float32.

    Examples:
        >>> f32(0.1)
        0.10000000149011612
    """
    return struct.unpack("f", struct.pack("f", number))[0]


def settle(x: Any, *, xp: Any) -> Any:
    """`x`, with 0 for what is not larger than `TINY`. NaN stays, -0 becomes 0.

    Args:
        x: float32, any shape.
        xp: the array namespace.

    Returns:
        float32 of the same shape.

    Examples:
        >>> import numpy as np
        >>> print(settle(np.float32([1.0, 2.0**-125, -0.0]), xp=np))
        [1. 0. 0.]
    """
    if is_torch(xp):
        return xp.nn.functional.hardshrink(x, TINY)  # one kernel
    size, zero = xp.abs(x), xp.zeros_like(x)
    # In JAX a 0 that the compiler does not know: with a known one it moves what is added to the
    # result into both arms, next to the product that x may be.
    return xp.where(size <= TINY, size * zero if is_jax(xp) else zero, x)


def add(a: Any, b: Any, *, xp: Any) -> Any:
    """`a + b`, settled. Both are float32 and settled, or numbers of `f32`; they broadcast."""
    return settle(a + b, xp=xp)


def sub(a: Any, b: Any, *, xp: Any) -> Any:
    """`a - b`, settled. Arguments as of `add`."""
    return settle(a - b, xp=xp)


def mul(a: Any, b: Any, *, xp: Any) -> Any:
    """`a * b`, settled. Arguments as of `add`."""
    return settle(a * b, xp=xp)


def div(a: Any, b: Any, *, xp: Any) -> Any:
    """`a / b`, correctly rounded and settled. Both are float32 arrays."""
    return down(opaque(up(a, xp=xp) / up(b, xp=xp), xp=xp), xp=xp)


def reciprocal(x: Any, *, xp: Any) -> Any:
    """`1 / x`, correctly rounded and settled."""
    return div(xp.ones_like(x), x, xp=xp)


def sqrt(x: Any, *, xp: Any) -> Any:
    """The root, correctly rounded and settled; NaN below 0."""
    return down(opaque(xp.sqrt(up(x, xp=xp)), xp=xp), xp=xp)


def up(x: Any, *, xp: Any) -> Any:
    """`x` as float64."""
    return cast(x, xp.float64)


def down(x: Any, *, xp: Any) -> Any:
    """float64 rounded to float32, settled."""
    return settle(cast(x, xp.float32), xp=xp)


_LOST = 29
"""Bits of a float64's mantissa that a float32 has not."""


def opaque(x: Any, *, xp: Any) -> Any:
    """float64 that a compiler does not see being rounded to float32, which it is next.

    In JAX it is rounded here already, on the whole number of its bits. NumPy and PyTorch round
    where they are told.
    """
    if not is_jax(xp):
        return x
    word = x.view(xp.int64)
    # To the nearest, ties to even. A NaN stays one, as the bits that a float32 lacks are 0 in it.
    word = word + ((1 << _LOST - 1) - 1) + ((word >> _LOST) & 1)
    return (word & -(1 << _LOST)).view(xp.float64)


def field(x: Any, *, xp: Any) -> Any:
    """The exponent field `e` of float32 numbers that are not negative; int32.

    `2^(e-127) <= x < 2^(e-126)`. It is 0 for 0 and 255 for what is not finite.
    """
    return (x.view(xp.int32) >> 23) & 255  # a maximum may be a NaN with a sign


def power(k: Any, *, xp: Any) -> Any:
    """`2^k` as float32, for int32 `-126 <= k <= 127`."""
    return ((k + 127) << 23).view(xp.float32)


def power64(k: Any, *, xp: Any) -> Any:
    """`2^k` as float64, for integers `-1022 <= k <= 1023`."""
    return ((cast(k, xp.int64) + 1023) << 52).view(xp.float64)


_LOG2_E = f32(math.log2(math.e))
LN2_HI = 45426 / 65536
"""The first 16 bits of ln 2: times a whole number below 256 it is exact."""
LN2_LO = f32(math.log(2) - LN2_HI)
EXP = tuple(f32(c) for c in (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2))
"""The polynomial of `exp`, from the highest power down."""


def exp(x: Any, *, xp: Any) -> Any:
    """The exponential; at most .98 ulp off. 0 below -86.5 and infinite above 88.5.

    `exp(x) = 2^n exp(r)` with the whole number `n` nearest to `x / ln 2`.
    """
    y = xp.where(x < -86.5, -86.5, xp.where(x > 88.5, 88.5, x))  # NaN stays
    n = xp.round(y * _LOG2_E)
    r = (y - n * LN2_HI) - mul(n, LN2_LO, xp=xp)  # the first product is exact
    p = _polynomial(EXP, r, xp=xp)
    p = 1.0 + (r + mul(mul(r, r, xp=xp), p, xp=xp))
    k = cast(xp.where(n == n, n, xp.zeros_like(n)), xp.int32)
    half = k >> 1
    out = (p * power(half, xp=xp)) * power(k - half, xp=xp)  # powers of two: exact
    out = xp.where(x < -86.5, xp.zeros_like(out), out)
    return settle(xp.where(x > 88.5, xp.full_like(out, math.inf), out), xp=xp)


_SQRT_HALF = 0x3F3504F3
"""The bits of the float32 root of 1/2."""
_LOG = tuple(f32(c) for c in (1 / 9, 1 / 7, 1 / 5, 1 / 3))


def log(x: Any, *, xp: Any) -> Any:
    """The natural logarithm `y` of positive normal float32 numbers.

    It is at most 1.9 ulp of `max(|y|, .5)` off. `x = 2^k f` with `f` between the roots of 1/2 and
    2, `s = (f - 1) / (f + 1)` and `log f = 2 (s + s^3/3 + s^5/5 + ...)`. For other
    numbers the result means nothing.
    """
    word = x.view(xp.int32)
    k = (word - _SQRT_HALF) >> 23
    f = (word - (k << 23)).view(xp.float32)
    s = div(f - 1.0, f + 1.0, xp=xp)
    z = mul(s, s, xp=xp)
    t = mul(mul(s, z, xp=xp), _polynomial(_LOG, z, xp=xp), xp=xp)
    k = cast(k, xp.float32)
    return settle(k * LN2_HI + (2.0 * (s + t) + mul(k, LN2_LO, xp=xp)), xp=xp)


def sigmoid(x: Any, *, xp: Any) -> Any:
    """`1 / (1 + exp(-x))`; at most 1.9 ulp off."""
    return reciprocal(1.0 + exp(-x, xp=xp), xp=xp)


_TANH = tuple(f32(c) for c in (-17 / 315, 2 / 15, -1 / 3, 1.0))


def tanh(x: Any, *, xp: Any) -> Any:
    """The hyperbolic tangent: a polynomial within 1/8 of 0, else `1 - 2 / (1 + exp(2 x))`."""
    z = mul(x, x, xp=xp)
    near = mul(x, _polynomial(_TANH, z, xp=xp), xp=xp)
    far = 1.0 - 2.0 * reciprocal(1.0 + exp(2.0 * x, xp=xp), xp=xp)
    return settle(xp.where(xp.abs(x) < 0.125, near, far), xp=xp)


_ERF = tuple(f32(c) for c in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592))
_ERF_T = f32(0.3275911)


def erf(x: Any, *, xp: Any) -> Any:
    """The error function; at most 4.4e-7 off. Abramowitz and Stegun 7.1.26."""
    a = xp.abs(x)
    t = reciprocal(mul(a, _ERF_T, xp=xp) + 1.0, xp=xp)
    p = mul(_polynomial(_ERF, t, xp=xp), t, xp=xp)
    y = 1.0 - mul(p, exp(-mul(a, a, xp=xp), xp=xp), xp=xp)
    return settle(xp.where(x < 0.0, -y, y), xp=xp)


_PI = f32(math.pi)
_SIN = tuple(f32(c) for c in (1 / 362880, -1 / 5040, 1 / 120, -1 / 6, 1.0))
_COS = tuple(f32(c) for c in (-1 / 3628800, 1 / 40320, -1 / 720, 1 / 24, -1 / 2, 1.0))


def cos_pi(t: Any, *, xp: Any) -> Any:
    """The cosine of `pi t` for `0 <= t <= 1`, for schedules; exactly 1, 0 and -1 at 0, 1/2 and 1.

    Within a quarter of either end a polynomial of the cosine, between them one of the sine.
    """
    first, last = t < 0.25, t > 0.75
    u = mul(xp.where(first, t, xp.where(last, 1.0 - t, 0.5 - t)), _PI, xp=xp)
    z = mul(u, u, xp=xp)
    end = _polynomial(_COS, z, xp=xp)
    middle = mul(u, _polynomial(_SIN, z, xp=xp), xp=xp)
    return settle(xp.where(first, end, xp.where(last, -end, middle)), xp=xp)


def _polynomial(coefficients: tuple[float, ...], z: Any, *, xp: Any) -> Any:
    """Horner's rule, from the highest power down; the last sum is not settled."""
    p = xp.full_like(z, coefficients[0])
    for c in coefficients[1:]:
        p = mul(p, z, xp=xp) + c
    return p
