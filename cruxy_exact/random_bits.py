"""Reproducible stochastic rounding: a counter hash, and what it rounds.

Random bits are a pure function of (counter, seed, leaf, element), in 32-bit integer arithmetic that
wraps alike in NumPy, JAX and PyTorch: no generator state, the same bits in each. Functions take the
array namespace as `xp` (`numpy`, `jax.numpy` or `torch`).
"""

from typing import Any

from cruxy_exact._namespace import cast

_GOLDEN = 0x9E3779B9
"""2^32 over the golden ratio: neighbouring integers come to lie far apart."""


def stream_key(counter: Any, seed: int, leaf: Any, *, xp: Any) -> Any:
    """The key of one leaf's random bits in one step.

    Args:
        counter: the step; int32 array, `()`. It may wrap.
        seed: tells runs apart; any whole number, taken modulo 2^32.
        leaf: tells the leaves of one run apart; a whole number, or an int32 array for many keys.
        xp: the array namespace.

    Returns:
        An int32 array, `()` or of the shape of `leaf`.
    """
    of_run = _signed(seed * _GOLDEN + 1)
    of_leaf = leaf * _signed(_GOLDEN) + 2
    if isinstance(leaf, int):
        of_leaf = _signed(of_leaf)
    return _mix(_mix(_mix(cast(counter, xp.int32)) ^ of_run) ^ of_leaf)


def layer_number(place: int) -> int:
    """The number of a model's dropout, by its place from 0, for a leaf `number + 64 grain`.

    The first sixty-four are their places. Further ones lie beyond 262,144 grains, so that none has
    the random bits of another in another grain.
    """
    block, first = divmod(place, 64)
    return first + (block << 24)


def random_bits(key: Any, index: Any) -> Any:
    """32 random bits for each element.

    Args:
        key: from `stream_key`.
        index: the row-major number of each element in its leaf; int32, any shape. It may wrap.

    Returns:
        int32 of the shape of `index`.
    """
    x = (index ^ key) * (0x9E3779B1 - 2**32)
    x = x ^ ((x >> 15) & 0x1FFFF)
    return x * (0x846CA68B - 2**32)


def round_to_bfloat16(x: Any, bits: Any, *, xp: Any) -> Any:
    """Stochastic rounding to the bfloat16 above or below, with exactly the right odds.

    A bfloat16 is the upper half of a float32, so adding 16 random bits to the lower half carries
    with the probability that the lower half stands for.

    Args:
        x: float32, any shape. What is not finite stays as it is.
        bits: from `random_bits`, of the same shape; the lower 16 are used.
        xp: the array namespace.

    Returns:
        float32 values, each of which bfloat16 holds exactly; a value above the largest bfloat16
        may become infinite.
    """
    word = x.view(xp.int32) + ((bits >> 16) & 0xFFFF)
    return xp.where(xp.isfinite(x), (word & -0x10000).view(xp.float32), x)


def _mix(x: Any) -> Any:
    """A bijection of the 32-bit integers in which each bit depends on all.

    Wellons' `lowbias32` ([Hash Prospector](https://github.com/skeeto/hash-prospector)), on signed
    integers, as PyTorch has no unsigned ones: a logical shift is an arithmetic one and a mask.
    """
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(x: int) -> int:
    """`x` modulo 2^32 as a signed 32-bit integer."""
    return (x + 2**31) % 2**32 - 2**31
