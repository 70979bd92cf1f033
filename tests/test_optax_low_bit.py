"""Arrays in low-bit codes: the bound of their code, every shape, every dtype, no hidden NaN."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cruxy_exact.codes import BlockCode
from cruxy_exact.random_bits import stream_key
from cruxy_optax import BlockLayout, LowBitArray
from low_bit import heavy_tailed, low_bit
from optimizers import assert_same
from relatives import crossed

SHAPES = [(64, 64), (96, 384), (65, 384), (7, 4099), (5000,), (4096,), (3, 3, 64, 64), (6, 6, 130)]
CODES = [BlockCode(bits, signed) for bits in (8, 4) for signed in (True, False)]
every_code = pytest.mark.parametrize("code", CODES, ids=str)


def scale_of_each(leaf):
    """The scale of each element's block, in the shape of the array."""
    ones = jnp.full(leaf.codes.shape, 1, leaf.codes.dtype)
    if leaf.code.bits == 4:
        ones = ones | (1 << 4)
    level = leaf.code.decode(jnp.ones((), jnp.uint8), jnp.float32(1.0), xp=jnp)
    return np.asarray(dataclasses.replace(leaf, codes=ones).decode() / level)


@pytest.mark.parametrize(
    ("shape", "code", "random"), crossed(SHAPES, CODES, [False, True]), ids=str
)
def test_array_comes_back_within_the_bound_of_its_code(shape, code, random):
    x = heavy_tailed(shape, code.signed)
    key = stream_key(jnp.int32(3), 0, 0, xp=jnp) if random else None
    leaf = low_bit(jnp.asarray(x), code).encode(jnp.asarray(x), key)
    bound = code.error_bound(x, scale_of_each(leaf), stochastic=random, xp=np)
    assert np.all(np.abs(np.asarray(leaf.decode(), np.float64) - x) <= bound * (1 + 1e-5))
    if not code.signed:
        assert np.all(leaf.decode() > 0)


@pytest.mark.parametrize(("shape", "code"), crossed(SHAPES, CODES), ids=str)
def test_each_block_is_what_the_code_makes_of_its_elements_alone(shape, code):
    x = heavy_tailed(shape, code.signed)
    leaf = low_bit(jnp.asarray(x), code)
    tile = leaf.layout.tile
    if not leaf.layout.folded:
        x, tile = np.pad(x.ravel(), (0, -x.size % tile[0])), tile
    parts = [(n // t, t) for n, t in zip(x.shape, tile, strict=True)]
    blocks = x.reshape([n for part in parts for n in part])
    own = tuple(range(1, 2 * len(parts), 2))
    scale = code.scale(np.abs(blocks).max(axis=own, keepdims=True), xp=np)
    want = code.decode(code.encode(blocks, scale, code.half, xp=np), scale, xp=np)
    got = np.asarray(leaf.decode())
    np.testing.assert_array_equal(got, want.reshape(-1)[: got.size].reshape(shape))
    np.testing.assert_array_equal(np.asarray(leaf.scales, np.float32).ravel(), scale.ravel())


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 300), min_size=1, max_size=4).map(tuple),
    block_size=st.sampled_from([32, 256, 1024]),
)
def test_layout_holds_every_element_once_and_blocks_are_near_their_size(shape, block_size):
    layout = BlockLayout.of(shape, block_size)
    size = math.prod(layout.tile)
    assert block_size // 2 <= size <= block_size
    assert math.prod(layout.scale_shape) * size == math.prod(layout.grid)
    assert 0 <= math.prod(layout.grid) - math.prod(shape) < block_size
    for bits in (8, 4):
        assert math.prod(layout.cut(bits).shape) == math.prod(layout.grid)
        assert math.prod(layout.code_shape(bits)) * 8 == math.prod(layout.grid) * bits


@every_code
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_array_keeps_its_dtype(code, dtype):
    x = jnp.asarray(heavy_tailed((64, 64), code.signed) / 100, dtype)
    leaf = low_bit(x, code)
    assert leaf.decode().dtype == dtype
    assert leaf.scales.dtype == jnp.bfloat16


@every_code
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_seen_in_its_block_and_nowhere_else(code, bad):
    x = np.ones((64, 64), np.float32)
    x[9, 40] = bad
    back = np.asarray(low_bit(jnp.asarray(x), code).decode())
    assert not np.isfinite(back[8:16, 32:]).any()
    assert np.isfinite(back[:8]).all()
    assert np.isfinite(back[8:16, :32]).all()


@every_code
def test_jit_gives_the_same_codes_as_no_jit(code):
    x = jnp.asarray(heavy_tailed((96, 384), code.signed))
    leaf, key = low_bit(x, code), stream_key(jnp.int32(1), 0, 0, xp=jnp)
    assert_same(jax.jit(LowBitArray.encode)(leaf, x, key), leaf.encode(x, key))
