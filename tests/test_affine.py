"""The code of activations: error bounds, no hidden NaN, unbiased, the same bits everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cruxy_exact.affine import LEAST, AffineCode
from cruxy_exact.random_bits import random_bits, stream_key
from test_codes import only

WORDS = "__name__ where abs isfinite full_like float32 int32 uint8".split()
every_code = pytest.mark.parametrize("code", [AffineCode(8), AffineCode(4)], ids=["8", "4"])


def bits_of(count, shape, seed=5, leaf=7):
    """Random bits for an array, in NumPy."""
    index = np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(shape)
    with np.errstate(over="ignore"):
        return random_bits(stream_key(np.int32(count), seed, leaf, xp=np), index)


def rows(seed=0, count=300):
    """Groups of all magnitudes: of both signs, of one, far from 0, constant, sparse."""
    rng = np.random.default_rng(seed)
    size = np.float32(10.0) ** rng.integers(-34, 37, (count, 1))
    x = rng.normal(size=(count, 256)) * size
    x[::5] = np.abs(x[::5])
    x[1::5] += 300.0 * size[1::5]
    x[2::5] *= rng.random((len(x[2::5]), 256)) < 0.1
    x[3::10] = x[3::10, :1]
    x[4::10] = -np.abs(x[4::10]) - 5.0 * size[4::10]
    return x.astype(np.float32)


def parameters(code, x, xp=np):
    with np.errstate(all="ignore"):
        return code.offset_and_step(x.min(-1, keepdims=True), x.max(-1, keepdims=True), xp=xp)


def there_and_back(code, x, noise=None):
    xp = only(np, WORDS)
    offset, step = parameters(code, x, xp)
    with np.errstate(all="ignore"):
        codes = code.encode(x, offset, step, code.half if noise is None else noise, xp=xp)
        return code.decode(codes, offset, step, xp=xp), codes, offset, step


@every_code
def test_nearest_errs_by_half_a_step_and_chance_by_a_whole_one(code):
    x = rows()
    for noise, share in ((None, 0.5), (code.noise(bits_of(1, x.shape)), 1.0)):
        got, _, _, step = there_and_back(code, x, noise)
        # Rounded to 2^-shift of a step before it is cut, and once more when it is decoded.
        allowed = step * (share + 2.0 ** (code.bits - 22)) + 2.0**-22 * np.abs(x) + 2 * LEAST
        assert (np.abs(got.astype(np.float64) - x) <= allowed).all()


@every_code
def test_offset_and_step_are_bfloat16_and_cover_the_group(code):
    x = rows()
    _, codes, offset, step = there_and_back(code, x)
    for number in (offset, step):
        assert (number.view(np.int32) & 0xFFFF == 0).all()
    assert (offset <= x.min(-1, keepdims=True)).all()
    top = offset.astype(np.float64) + code.levels * step.astype(np.float64)
    assert (top >= x.max(-1, keepdims=True)).all()
    assert codes.dtype == np.uint8
    assert codes.max() <= code.levels


@every_code
def test_a_step_is_no_wider_than_two_roundings_to_bfloat16_ask_for(code):
    x = rows()
    low, high = (x.astype(np.float64).min(-1), x.astype(np.float64).max(-1))
    step = parameters(code, x)[1][:, 0]
    least = (high - low + 2.0**-7 * np.abs(low)) / code.levels
    assert (step <= least * (1 + 2.0**-6) + 2 * LEAST).all()


@every_code
def test_constant_zeros_decode_to_zeros_whatever_the_noise(code):
    got = there_and_back(code, np.zeros((1, 256), np.float32), code.noise(bits_of(3, (1, 256))))[0]
    assert (got == 0.0).all()


@every_code
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_its_whole_group_nan_and_no_other(code, bad):
    x = np.ones((2, 256), np.float32)
    x[0, 17] = bad
    got = there_and_back(code, x)[0]
    assert np.isnan(got[0]).all()
    assert (got[1] == 1.0).all()


def test_a_group_wider_than_float32_is_nan():
    x = np.array([[3e38, -3e38, 0.0]], np.float32)
    assert np.isnan(there_and_back(AffineCode(8), x)[0]).all()


@every_code
def test_the_mean_over_many_draws_is_the_value(code):
    x = np.random.default_rng(3).gamma(0.5, size=(4, 256)).astype(np.float32)
    draws = 400
    mean, step = np.zeros(x.shape), parameters(code, x)[1].astype(np.float64)
    for count in range(draws):
        mean += there_and_back(code, x, code.noise(bits_of(count, x.shape)))[0] / draws
    # A draw has a standard deviation of at most half a step.
    deviation = (mean - x) / (0.5 * step / np.sqrt(draws))
    assert np.abs(deviation).max() < 5.0
    assert abs(deviation.mean()) < 4.0 / np.sqrt(x.size)


def test_rounding_the_offset_after_coding_is_seen_by_that_test():
    """What the code guards against: the mean is then off by what the offset was moved."""
    code, draws = AffineCode(8), 400
    x = 1.0 + np.random.default_rng(3).random((4, 256), np.float32) / 8
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    step = ((high - low) / code.levels).astype(np.float32)
    rounded = (low.view(np.int32) & -0x10000).view(np.float32)
    mean = np.zeros(x.shape)
    for count in range(draws):
        codes = code.encode(x, low, step, code.noise(bits_of(count, x.shape)), xp=np)
        mean += code.decode(codes, rounded, step, xp=np) / draws
    assert np.abs((mean - x) / (0.5 * step / np.sqrt(draws))).max() > 5.0


@every_code
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "random"])
def test_numpy_jax_compiled_jax_and_torch_have_the_same_bits(code, stochastic):
    torch = pytest.importorskip("torch")
    x = rows(1)
    noise = code.noise(bits_of(9, x.shape)) if stochastic else np.int32(code.half)
    want, codes, offset, step = there_and_back(code, x, noise)

    def in_jax(x, noise):
        offset, step = parameters(code, x, jnp)
        codes = code.encode(x, offset, step, noise, xp=jnp)
        return code.decode(codes, offset, step, xp=jnp), codes, offset, step

    t, n = torch.from_numpy(x), torch.from_numpy(np.array(noise))
    o, s = code.offset_and_step(t.amin(-1, True), t.amax(-1, True), xp=torch)
    c = code.encode(t, o, s, n, xp=torch)
    in_torch = [v.numpy() for v in (code.decode(c, o, s, xp=torch), c, o, s)]
    for got in (in_jax(jnp.asarray(x), noise), jax.jit(in_jax)(x, noise), in_torch):
        for ours, theirs in zip((want, codes, offset, step), got, strict=True):
            np.testing.assert_array_equal(np.asarray(theirs), ours)


@pytest.mark.parametrize("bits", [2, 16, True])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be 8 or 4, got"):
        AffineCode(bits)
