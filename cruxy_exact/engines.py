"""How the exact integer sums of a matrix product are found: three engines, each of which is tested.

An engine takes whole numbers in float32 and returns their matrix product in float64, without error
up to `2^53` and rounded once above. All give the same bits; they differ in speed alone:

- `"f64"`: one float64 product while `K <= 2^(53 - 2 bits)`, in blocks above.
- `"int8"`: digits of 7 bits in int8, added in int32; three products of sums (Karatsuba) save as
  many of the nine. `"int8_direct"` does without, for hardware whose int8 products saturate.
- `"digits"`: the same digits in float32; exact where inputs are cut to TensorFloat-32 or bfloat16.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

from cruxy_exact._namespace import cast, count_up, is_torch, join, transposed, zeros
from cruxy_exact.arithmetic import up

ENGINES = ("f64", "int8", "int8_direct", "digits")
"""In the order in which one replaces another that fails its test."""
DIGIT = 7
"""Bits of a digit, which lies from -64 to 64."""
INT8_BLOCK = 2**17 - 8
"""Up to this length 128 * 128 * K fits into int32."""
DIGIT_BLOCK = 4096
"""Up to this length 64 * 64 * K fits into a float32's 24 bits."""


@dataclasses.dataclass(frozen=True)
class Precision:
    """How matrix products are computed.

    Attributes:
        bits: of the rounded inputs, 8 to 23. Part of the result: 20 has the accuracy of
            TensorFloat-32 and more, 22 that of float32, 13 is quicker with `"int8"`.
        engine: one of `ENGINES`. No part of the result.

    Raises:
        ValueError: where `bits` or `engine` is none of these.
    """

    bits: int = 20
    engine: str = "f64"

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 8 <= self.bits <= 23:
            raise ValueError(
                f"bits must be a whole number from 8 to 23, got {self.bits!r}; use 20."
            )
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {ENGINES}, got {self.engine!r}; use 'f64'.")

    @property
    def digits(self) -> int:
        """How many digits of 7 bits hold the whole numbers."""
        return -(-(self.bits + 1) // DIGIT)

    @property
    def block(self) -> int:
        """The longest inner axis that the engine takes at once."""
        blocks = {"f64": 2 ** (53 - 2 * self.bits), "digits": DIGIT_BLOCK}
        return blocks.get(self.engine, INT8_BLOCK)


DEFAULT = Precision()


def multiply(a: Any, b: Any, precision: Precision, *, xp: Any) -> Any:
    """The product of whole numbers, exact and then rounded to float64.

    Args:
        a: whole numbers of at most `2^bits` in float32, `[..., M, K]`.
        b: the same, `[..., K, N]`.
        precision: bits and engine.
        xp: the array namespace.

    Returns:
        float64, `[..., M, N]`.
    """
    length, block = a.shape[-1], precision.block
    product = _ENGINES[precision.engine]
    if length <= block and precision.engine == "f64":
        return product(a, b, precision, xp)
    sums = zeros((1,) * a.ndim, xp.int64, a, xp=xp)
    for k in range(0, max(length, 1), block):
        part = product(a[..., :, k : k + block], b[..., k : k + block, :], precision, xp)
        sums = sums + cast(part, xp.int64)
    return up(sums, xp=xp)


def _float64(a: Any, b: Any, precision: Precision, xp: Any) -> Any:
    return xp.matmul(up(a, xp=xp), up(b, xp=xp))


def split(q: Any, digits: int, *, xp: Any) -> list[Any]:
    """The digits of whole numbers, the lowest first, in float32."""
    out = []
    for _ in range(digits - 1):
        high = xp.floor(q * 2.0**-DIGIT + 0.5)
        out.append(q - high * 2.0**DIGIT)
        q = high
    return [*out, q]


def _direct(a: Any, b: Any, precision: Precision, xp: Any, product: Callable[..., Any]) -> Any:
    left, right = (split(q, precision.digits, xp=xp) for q in (a, b))
    sums = 0
    for i, x in enumerate(left):
        for j, y in enumerate(right):
            sums = sums + (cast(product(x, y, xp), xp.int64) << (DIGIT * (i + j)))
    return sums


def _karatsuba(a: Any, b: Any, precision: Precision, xp: Any) -> Any:
    """`a_i b_j + a_j b_i = (a_i + a_j) (b_i + b_j) - a_i b_i - a_j b_j`."""
    left, right = (split(q, precision.digits, xp=xp) for q in (a, b))
    squares = [cast(_int8(x, y, xp), xp.int64) for x, y in zip(left, right, strict=True)]
    sums = 0
    for i, square in enumerate(squares):
        sums = sums + (square << (2 * DIGIT * i))
        for j in range(i):
            both = cast(_int8(left[i] + left[j], right[i] + right[j], xp), xp.int64)
            sums = sums + ((both - square - squares[j]) << (DIGIT * (i + j)))
    return sums


def _float32(a: Any, b: Any, xp: Any) -> Any:
    return xp.matmul(a, b)


def _int8(a: Any, b: Any, xp: Any) -> Any:
    """The int32 product of whole numbers from -128 to 127 in float32."""
    a, b = cast(a, xp.int8), cast(b, xp.int8)
    if xp.__name__ == "numpy":
        return xp.matmul(cast(a, xp.int32), cast(b, xp.int32))
    if not is_torch(xp):
        return xp.matmul(a, b, preferred_element_type=xp.int32)
    if a.ndim == 2:
        return _int8_torch(a, b, xp)
    shape = (*a.shape[:-1], b.shape[-1])
    if b.ndim == 2:
        return _int8_torch(a.reshape(-1, a.shape[-1]), b, xp).reshape(shape)
    pairs = zip(a.flatten(0, -3), b.flatten(0, -3), strict=True)
    parts = [_int8_torch(x, y, xp) for x, y in pairs]
    if not parts:
        return zeros(shape, xp.int32, a, xp=xp)
    return xp.stack(parts).reshape(shape)


def _int8_torch(a: Any, b: Any, xp: Any) -> Any:
    """`torch._int_mm` with the sizes that CUDA asks for: more than 16 rows, else multiples of 8."""
    m, k, n = *a.shape, b.shape[-1]
    if not m or not k or not n:
        return zeros((m, n), xp.int32, a, xp=xp)
    if a.device.type == "cpu":
        return xp._int_mm(a.contiguous(), b.contiguous())
    pad = xp.nn.functional.pad
    a = pad(a, (0, -k % 8, 0, max(0, 17 - m)))
    b = pad(b, (0, -n % 8, 0, -k % 8))
    return xp._int_mm(a.contiguous(), b.contiguous())[:m, :n]


_ENGINES: dict[str, Callable[..., Any]] = {
    "f64": _float64,
    "int8": _karatsuba,
    "int8_direct": lambda a, b, precision, xp: _direct(a, b, precision, xp, _int8),
    "digits": lambda a, b, precision, xp: _direct(a, b, precision, xp, _float32),
}


def self_test(precision: Precision, like: Any, *, xp: Any) -> bool:
    """Whether an engine gives the right integers where `like` lies, at its largest length.

    Multiplies matrices of the most extreme digits of both signs, alike and alternating, at the
    largest inner length that the engine takes at once, and compares with sums known beforehand.

    Args:
        precision: bits and engine.
        like: an array on the device to test, float32.
        xp: the array namespace. In JAX outside of any trace.

    Returns:
        Whether all sums are right.
    """
    length, rows = precision.block, 24
    if precision.engine == "f64":
        length = min(length, 2**15)
    place = count_up(length, like, xp=xp) % 4
    low, high = _extremes(precision)
    patterns = [
        (low, low, low, low), (high, high, high, high), (low, low, high, high),
        (high, low, high, low), (-low, -low, -low, -low), (-high, high, -high, high),
    ]  # fmt: skip
    parts, nothing = [], zeros((length,), xp.float32, like, xp=xp)
    for pattern in patterns:
        row = nothing
        for i, number in enumerate(pattern):
            row = xp.where(place == i, nothing + number, row)
        parts.append(row[None, :])
    a = join(parts * (rows // len(parts)), 0, xp=xp)
    got = multiply(a, transposed(a, xp=xp), precision, xp=xp)
    # The length is a multiple of 4: whole numbers of Python, rounded once.
    one = zeros((1, 1), xp.float64, like, xp=xp)
    right = True
    for i, p in enumerate(patterns):
        for j, q in enumerate(patterns):
            want = sum(int(x) * int(y) for x, y in zip(p, q, strict=True)) * (length // 4)
            found = got[i :: len(patterns), j :: len(patterns)]
            right = right and bool((found == one + float(want)).all())
    return right


def _extremes(precision: Precision) -> tuple[float, float]:
    """The numbers whose digits, and their sums in pairs, are as small and as large as they get."""
    if precision.engine == "f64":
        return -(2.0**precision.bits), 2.0**precision.bits
    shift = DIGIT * (precision.digits - 1)
    found = []
    for digit in (-64, 63):
        below = sum(digit * 2 ** (DIGIT * i) for i in range(precision.digits - 1))
        sign, top = (1 if digit > 0 else -1), min(abs(digit), 2 ** (precision.bits - shift))
        while abs(below + sign * top * 2**shift) > 2**precision.bits:
            top -= 1
        found.append(float(below + sign * top * 2**shift))
    return found[0], found[1]


def choose(precision: Precision, like: Any, *, xp: Any) -> Precision:
    """`precision`, with the first engine from the one it names on that passes its `self_test`.

    Args:
        precision: bits and the engine that is wanted.
        like: an array on the device, float32.
        xp: the array namespace. In JAX outside of any trace.

    Returns:
        The same bits, and an engine that is right here. It warns where that is another one.

    Raises:
        RuntimeError: where no engine is right here.
    """
    for engine in ENGINES[ENGINES.index(precision.engine) :]:
        found = dataclasses.replace(precision, engine=engine)
        try:
            right = self_test(found, like, xp=xp)
        except (RuntimeError, NotImplementedError, TypeError):  # the device lacks a data type
            right = False
        if right:
            if engine != precision.engine:
                warnings.warn(
                    f"the engine {precision.engine!r} fails its self-test here; {engine!r} takes "
                    "its place, with the same bits",
                    stacklevel=2,
                )
            return found
    raise RuntimeError(
        f"no engine from {precision.engine!r} on is exact on this device; train on a CPU or an "
        "NVIDIA GPU."
    )
