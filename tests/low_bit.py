"""Trees, arrays and look-ups that the tests of low-bit states share."""

import jax
import jax.numpy as jnp
import numpy as np

from cruxy_optax import BlockLayout, LowBitArray


def coded(state):
    """The coded arrays of a state by their paths."""
    flat, _ = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda n: isinstance(n, LowBitArray)
    )
    return {jax.tree_util.keystr(p): n for p, n in flat if isinstance(n, LowBitArray)}


def large_tree(seed=0, dtype=jnp.float32):
    """A matrix and a long vector that are coded, and two leaves that are too small."""
    rng = np.random.default_rng(seed)
    shapes = {"w": (96, 64), "long": (5000,), "b": (64,), "s": ()}
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def heavy_tailed(shape, signed, seed=0):
    """Numbers of many magnitudes, as momentum or as its square."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp(2 * rng.normal(size=shape))
    return np.asarray(x if signed else x * x, np.float32)


def low_bit(x, code, block_size=256):
    """An array in this code, rounded to nearest."""
    layout = BlockLayout.of(x.shape, block_size)
    return LowBitArray(None, None, code, layout, x.dtype).encode(x, None)
