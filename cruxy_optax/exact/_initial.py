"""Initializers with the same bits everywhere."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cruxy_exact import initial
from cruxy_exact.random_bits import stream_key
from cruxy_optax.exact._frame import frame

Initializer = Callable[..., jax.Array]


def uniform_init(scale: float | None = None) -> Initializer:
    """Uniform initial values that are the same everywhere.

    Args:
        scale: of the numbers, from `-scale` up to `scale`; `None` for one over the root of all axes
            but the last, multiplied.

    Returns:
        A function of a key of `jax.random`, a shape and a dtype, which has to be float32.
    """
    return _init(initial.uniform, scale)


def normal_init(stddev: float | None = None) -> Initializer:
    """Nearly normal initial values that are the same everywhere; none is beyond 6 deviations.

    Args:
        stddev: the standard deviation; `None` as in `uniform_init`.

    Returns:
        See `uniform_init`.
    """
    return _init(initial.normal, stddev)


def _init(values: Any, scale: float | None) -> Initializer:
    def init(key: Any, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        if jnp.dtype(dtype) != jnp.float32:
            raise TypeError(f"exact layers have float32 parameters, got {dtype}; leave it out.")
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.key_data(key)
        size = 1 / math.sqrt(math.prod(shape[:-1])) if scale is None else scale
        with frame():
            words = jax.lax.bitcast_convert_type(key, jnp.int32)
            mixed = stream_key(words[0], 0, words[-1], xp=jnp)
            return values(shape, size, mixed, xp=jnp)

    return init
