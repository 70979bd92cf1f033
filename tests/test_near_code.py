"""The code of a number near a known one: right within its reach, unbiased, alike everywhere."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cruxy_exact.near import NearCode
from cruxy_exact.random_bits import random_bits, stream_key

either = pytest.mark.parametrize("bits", [16, 8])
WORDS = "where clip floor float32 int32 int16 int8".split()
XP = types.SimpleNamespace(**{word: getattr(np, word) for word in WORDS})
"""NumPy with the words that the module may use and nothing else."""


def blocks(seed=0, count=50):
    """Known numbers and offsets from them, in blocks of many sizes, one a row."""
    rng = np.random.default_rng(seed)
    near = rng.normal(size=(count, 256)) * 10.0 ** rng.integers(-6, 3, (count, 1))
    offset = rng.normal(size=(count, 256)) * 10.0 ** rng.integers(-6, 0, (count, 1))
    return near.astype(np.float32), offset.astype(np.float32)


def grid_of(code, offset):
    reach = np.abs(offset).max(-1, keepdims=True)
    return code.grid(reach, np.ones_like(reach), xp=XP)


def noise_of(code, shape, leaf=0):
    index = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    with np.errstate(over="ignore"):
        return code.noise(random_bits(stream_key(np.int32(3), 0, leaf, xp=np), index), xp=XP)


@either
def test_number_comes_back_to_within_half_a_step_and_a_rounding(bits):
    code, (near, offset) = NearCode(bits), blocks()
    grid = grid_of(code, offset)
    back = code.offset(code.encode(offset, near, grid, 0.5, xp=XP), near, grid, xp=XP)
    assert (np.abs(back - offset) <= 0.5 * grid + 2.0**-20 * np.abs(offset)).all()


@either
def test_number_stays_where_it_is_however_the_known_one_moves_within_reach(bits):
    code, (near, offset) = NearCode(bits), blocks()
    grid = grid_of(code, offset)
    codes = code.encode(offset, near, grid, 0.5, xp=XP)
    before = near.astype(np.float64) + code.offset(codes, near, grid, xp=XP)
    reach = np.abs(offset).max(-1, keepdims=True)
    moved = near + reach * np.random.default_rng(1).uniform(-0.9, 0.9, near.shape)
    moved = moved.astype(np.float32)
    after = moved.astype(np.float64) + code.offset(codes, moved, grid, xp=XP)
    assert (np.abs(after - before) <= 2.0**-22 * (np.abs(near) + reach)).all()


@either
def test_number_out_of_reach_is_read_no_further_off_than_the_reach(bits):
    code, (near, offset) = NearCode(bits), blocks()
    grid = grid_of(code, offset)
    codes = code.encode(offset, near, grid, 0.5, xp=XP)
    away = code.offset(codes, near + 1000.0 * grid * code.span, grid, xp=XP)
    assert (np.abs(away) <= 0.5 * code.span * grid).all()


@either
def test_step_of_a_block_is_left_alone_where_it_fits(bits):
    code = NearCode(bits)
    first = code.grid(np.float32(0.3), np.float32(2.0**-40), xp=XP)
    for reach in (0.3, 0.26, 0.49, 0.3 / 2):
        assert code.grid(np.float32(reach), first, xp=XP) == first
    assert code.grid(np.float32(1.2), first, xp=XP) > first
    assert code.grid(np.float32(0.05), first, xp=XP) < first


@either
def test_rounding_by_chance_errs_by_nothing_on_average(bits):
    code, (near, offset) = NearCode(bits), blocks(count=8)
    grid, sums = grid_of(code, offset), 0.0
    for leaf in range(400):
        codes = code.encode(offset, near, grid, noise_of(code, near.shape, leaf), xp=XP)
        sums += code.offset(codes, near, grid, xp=XP) - offset
    assert np.abs((sums / 400 / grid).mean(1)).max() < 6 * 0.5 / np.sqrt(400 * 256)


@pytest.mark.parametrize("bits", [15, 4, 32])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be 16 or 8, got {bits}"):
        NearCode(bits)


@either
def test_codes_are_the_same_in_every_framework(bits):
    code, (near, offset) = NearCode(bits), blocks()
    grid, noise = grid_of(code, offset), noise_of(code, near.shape)
    wanted = code.encode(offset, near, grid, noise, xp=XP)
    there = torch.from_numpy
    torches = code.encode(there(offset), there(near), there(grid), there(noise), xp=torch)
    np.testing.assert_array_equal(torches.numpy(), wanted)
    jaxes = jax.jit(lambda *args: code.encode(*args, xp=jnp))(offset, near, grid, noise)
    np.testing.assert_array_equal(jaxes, wanted)
    np.testing.assert_array_equal(
        jax.jit(lambda *args: code.offset(*args, xp=jnp))(wanted, near, grid),
        code.offset(there(wanted), there(near), there(grid), xp=torch).numpy(),
    )
