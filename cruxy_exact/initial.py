"""Initial values that are the same everywhere: from random bits by exact integers.

In JAX inside `jax.enable_x64(True)`.
"""

import math
from collections.abc import Sequence
from typing import Any

from cruxy_exact._namespace import cast, count_up
from cruxy_exact.arithmetic import f32, mul
from cruxy_exact.random_bits import random_bits


def uniform(shape: Sequence[int], scale: float, key: Any, *, xp: Any) -> Any:
    """Uniform numbers from `-scale` up to `scale`.

    Args:
        shape: of the result.
        scale: rounded to float32.
        key: from `random_bits.stream_key`, an int32 array `()`.
        xp: the array namespace.

    Returns:
        float32: multiples of `2^-23`, times `scale`.
    """
    bits = random_bits(key, count_up(math.prod(shape), key, xp=xp))
    return mul(cast(bits >> 8, xp.float32) * 2.0**-23, f32(scale), xp=xp).reshape(tuple(shape))


def normal(shape: Sequence[int], scale: float, key: Any, *, xp: Any) -> Any:
    """Nearly normal numbers with the standard deviation `scale`; none beyond 6 of them.

    The sum of twelve uniform 16-bit numbers, six words an element. Arguments as of `uniform`.
    """
    index = count_up(math.prod(shape), key, xp=xp) * 6
    sums = index * 0 - 6 * 65535
    for i in range(6):
        word = random_bits(key, index + i)
        sums = sums + ((word >> 16) & 0xFFFF) + (word & 0xFFFF)
    return mul(cast(sums, xp.float32) * 2.0**-16, f32(scale), xp=xp).reshape(tuple(shape))
