"""The low-bit codes: error bounds, no hidden NaN, no false zero, unbiased, alike everywhere."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from cruxy_exact.codes import TINY, BlockCode, pack, unpack
from cruxy_exact.random_bits import random_bits, round_to_bfloat16, stream_key
from cruxy_exact.rounding import quotient
from inexact import dividing

CODES = {
    f"{bits} bits {'signed' if signed else 'non-negative'}": BlockCode(bits, signed)
    for bits in (8, 4)
    for signed in (True, False)
}
every_code = pytest.mark.parametrize("code", CODES.values(), ids=list(CODES))
either_rounding = pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "random"])

CODE_WORDS = "__name__ where clip abs isfinite full_like float32 int32 int8 uint8".split()
HASH_WORDS = "where isfinite float32 int32".split()


def only(xp, words):
    """`xp` with the words that the module may use and nothing else."""
    return types.SimpleNamespace(**{word: getattr(xp, word) for word in words})


def bits_of(count, shape, seed=5, leaf=7):
    """Random bits for an array, in NumPy."""
    index = np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(shape)
    with np.errstate(over="ignore"):
        return random_bits(stream_key(np.int32(count), seed, leaf, xp=np), index)


def there_and_back(code, x, noise=None):
    """What the blocks, one a row, decode to, and their scales."""
    xp = only(np, CODE_WORDS)
    with np.errstate(all="ignore"):
        scale = code.scale(np.max(np.abs(x), axis=-1, keepdims=True), xp=xp)
        codes = code.encode(x, scale, code.half if noise is None else noise, xp=xp)
        return code.decode(codes, scale, xp=xp), scale


def rows(seed=0, count=400):
    """Blocks of all magnitudes: normal ones, heavy-tailed ones, sparse ones, ties."""
    rng = np.random.default_rng(seed)
    size = np.float32(10.0) ** rng.integers(-37, 38, (count, 1))
    x = rng.normal(size=(count, 256)) * np.exp(rng.normal(size=(count, 256)) * 2) * size
    x[::5] *= rng.random((len(x[::5]), 256)) < 0.1
    x[1::5] = np.round(x[1::5] / size[1::5] * 4) / 4 * size[1::5]
    with np.errstate(all="ignore"):
        x = np.nan_to_num(x.astype(np.float32))
    return np.where(np.abs(x) < TINY, np.float32(0.0), x)


blocks = st_numpy.arrays(
    np.float32,
    st.tuples(st.just(1), st.integers(1, 40)),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)
LARGEST = float(np.finfo(np.float32).max)


@every_code
@either_rounding
@settings(max_examples=100, deadline=None)
@given(x=blocks, count=st.integers(-(2**31), 2**31 - 1))
@example(x=np.zeros((1, 3), np.float32), count=0)
@example(x=np.array([[1e-45, 1e-39, 0.0]], np.float32), count=0)
@example(x=np.array([[TINY, -TINY, 1e-38]], np.float32), count=1)
@example(x=np.array([[LARGEST, -LARGEST, 1e38, 1.0]], np.float32), count=2)
@example(x=np.array([[1e30, *[1.0] * 255]], np.float32), count=3)
def test_round_trip_errs_by_no_more_than_the_bound(code, stochastic, x, count):
    x = x if code.signed else np.abs(x)
    noise = code.noise(bits_of(count, x.shape)) if stochastic else None
    got, scale = there_and_back(code, x, noise)
    with np.errstate(all="ignore"):
        bound = code.error_bound(x, scale, stochastic=stochastic, xp=np)
    assert np.all(np.abs(got.astype(np.float64) - x) <= bound)


@every_code
@either_rounding
def test_bound_is_reached(code, stochastic):
    x = rows() if code.signed else np.abs(rows())
    got, scale = there_and_back(code, x, code.noise(bits_of(0, x.shape)) if stochastic else None)
    bound = code.error_bound(x, scale, stochastic=stochastic, xp=np)
    used = np.abs(got.astype(np.float64) - x)[x != 0] / bound[x != 0]
    # Half a step is (8/7)/2 of the bound at worst where one octave has but four steps.
    assert 0.85 < used.max() <= 1.0


@every_code
@settings(max_examples=100, deadline=None)
@given(x=blocks)
@example(x=np.array([[1e-36, 1.0, 0.0]], np.float32))
@example(x=np.array([[TINY]], np.float32))
def test_non_negative_code_has_no_zero_and_a_zero_block_nothing_else(code, x):
    x = np.abs(x)
    got, _ = there_and_back(code, x)
    if np.max(x) < TINY:
        assert np.all(got == 0.0)
    elif not code.signed:
        assert np.all(got >= TINY)


@every_code
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_that_is_not_finite_hides_in_a_block(code, bad):
    x = rows(count=4)[:, :7]
    x[2, 3] = bad
    got, _ = there_and_back(code, x)
    assert not np.isfinite(got[2]).any()
    assert np.isfinite(got[[0, 1, 3]]).all()


@every_code
def test_beside_an_outlier_the_others_count_on_average_or_stay_above_zero(code):
    x = np.full((1, 2**14), 1e-3, np.float32)
    x[0, 0] = 1.0
    got, scale = there_and_back(code, x, code.noise(bits_of(0, x.shape)))
    assert scale[0, 0] == got[0, 0] == 1.0
    if code.signed:  # its first step is wider than twice 1e-3: nearest rounding gives 0
        unit = float(got[got > 0].min())
        spread = np.sqrt(1e-3 * unit / 2**14)
        assert abs(got[0, 1:].mean() - 1e-3) < SIGMAS * spread
        assert np.all(there_and_back(code, x)[0][0, 1:] == 0.0)
    else:
        assert np.all(got[0, 1:] >= 0.9e-3)


def test_levels_are_those_of_the_docstring():
    levels = {name: there(code) for name, code in CODES.items()}
    np.testing.assert_allclose(levels["4 bits signed"], [0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1])
    np.testing.assert_allclose(levels["8 bits signed"][1] * 14.75, 1 / 32, rtol=1e-6)
    assert levels["8 bits non-negative"][0] == pytest.approx(1 / 63488)
    assert levels["4 bits non-negative"][0] == pytest.approx(1 / 192)
    for name, level in levels.items():
        assert level[-1] == pytest.approx(1.0, abs=2.0**-24), name
        assert np.all(np.diff(level) > 0), name


def there(code):
    """The non-negative levels of a code at scale 1."""
    codes = np.arange(code.levels + 1).astype(np.uint8)
    return code.decode(codes, np.float32(1.0), xp=np)


@every_code
def test_every_level_codes_to_itself(code):
    level = there(code)
    codes = code.encode(level, np.float32(1.0), code.half, xp=np)
    np.testing.assert_array_equal(codes, np.arange(code.levels + 1))


@every_code
def test_zeros_are_the_codes_of_zeros(code):
    zero = np.zeros((2, 3), np.float32)
    got = code.decode(np.zeros((2, 3), np.uint8), zero[:, :1], xp=np)
    np.testing.assert_array_equal(got, zero)


@pytest.mark.parametrize("high", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("number", [29.5, 63488.0, 5.0, 192.0, 1.0])
def test_a_quotient_is_right_where_division_is_not(number, high):
    class Words:
        """NumPy where it divides as XLA does on a GPU, and whose quotients are taken for that."""

        __name__ = "jax.numpy"

        def __getattr__(self, name):
            return getattr(np, name)

        def full_like(self, x, value):
            return np.full_like(x, value).view(dividing(high))

    mantissas = np.arange(128, 256, dtype=np.float32) / 128
    scale = np.concatenate([mantissas * np.float32(2.0**k) for k in (-100, -3, 0, 7, 100)])
    found = np.asarray(quotient(number, scale, xp=Words()))
    assert np.array_equal(found, quotient(number, scale, xp=np))
    assert np.array_equal(np.asarray(quotient(number, jnp.asarray(scale), xp=jnp)), found)


@every_code
def test_scale_is_a_bfloat16_no_smaller_than_the_largest(code):
    largest = np.abs(rows())[:, 0]
    scale = code.scale(largest, xp=np)
    np.testing.assert_array_equal(scale.view(np.int32) & 0xFFFF, 0)
    assert np.all((scale >= largest) | (scale >= 3.38e38))
    assert np.all(scale[largest > 1e-30] <= largest[largest > 1e-30] * (1 + 2.0**-7))


def jax_codes(code, x, count, stochastic):
    scale = code.scale(jnp.max(jnp.abs(x), axis=-1, keepdims=True), xp=only(jnp, CODE_WORDS))
    index = jnp.arange(x.size, dtype=jnp.int32).reshape(x.shape)
    bits = random_bits(stream_key(count, 5, 7, xp=jnp), index)
    noise = code.noise(bits) if stochastic else code.half
    codes = code.encode(x, scale, noise, xp=only(jnp, CODE_WORDS))
    return codes, scale, code.decode(codes, scale, xp=jnp)


def torch_codes(code, x, count, stochastic):
    torch = pytest.importorskip("torch")
    x = torch.as_tensor(x)
    scale = code.scale(torch.amax(torch.abs(x), -1, keepdim=True), xp=only(torch, CODE_WORDS))
    index = torch.arange(x.numel(), dtype=torch.int32).reshape(x.shape)
    bits = random_bits(stream_key(torch.tensor(count, dtype=torch.int32), 5, 7, xp=torch), index)
    noise = code.noise(bits) if stochastic else code.half
    codes = code.encode(x, scale, noise, xp=only(torch, CODE_WORDS))
    return codes.numpy(), scale.numpy(), code.decode(codes, scale, xp=torch).numpy()


def jitted(code, x, count, stochastic):
    return jax.jit(lambda x, t: jax_codes(code, x, t, stochastic))(x, jnp.int32(count))


def eager(code, x, count, stochastic):
    return jax_codes(code, jnp.asarray(x), jnp.int32(count), stochastic)


@every_code
@either_rounding
@pytest.mark.parametrize("other", [eager, jitted, torch_codes])
def test_codes_are_the_same_in_every_namespace(code, stochastic, other):
    x = rows() if code.signed else np.abs(rows())
    noise = code.noise(bits_of(3, x.shape)) if stochastic else code.half
    scale = code.scale(np.max(np.abs(x), -1, keepdims=True), xp=np)
    codes = code.encode(x, scale, noise, xp=np)
    decoded = code.decode(codes, scale, xp=np)
    got = other(code, x, 3, stochastic)
    np.testing.assert_array_equal(codes, got[0])
    np.testing.assert_array_equal(scale, got[1])
    whole = np.abs(decoded) >= TINY  # levels that are denormals XLA takes for 0
    np.testing.assert_array_equal(decoded[whole], np.asarray(got[2])[whole])


@every_code
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_coded_as_the_float32_it_is(code, dtype):
    torch = pytest.importorskip("torch")
    x = np.abs(np.random.default_rng(0).normal(size=(4, 64))).astype(np.float32)
    narrow = jnp.asarray(x, dtype)
    want = jax_codes(code, narrow.astype(jnp.float32), jnp.int32(0), True)
    ours = jax_codes(code, narrow, jnp.int32(0), True)
    theirs = torch_codes(code, torch.tensor(x).to(getattr(torch, dtype)), 0, True)
    for a, b, c in zip(want, ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


DRAWS = 4096
SIGMAS = 6.0
"""Six standard deviations: by Bernstein's inequality, with a variance of at least 1 / DRAWS of a
step squared, fewer than 1 in 10^5 of all sets of bits would fail; these are fixed."""


@every_code
def test_stochastic_rounding_is_unbiased(code):
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.normal(size=200) / 3, np.geomspace(0.02, 1.0, 55), [1.0]])
    x = x if code.signed else np.clip(np.abs(x), 0.006, None)
    x = np.clip(x, -1.0, 1.0).astype(np.float32)
    total, first = np.zeros(256), there_and_back(code, x[None])[1]
    for t in range(DRAWS):
        total += there_and_back(code, x[None], code.noise(bits_of(t, (1, 256))))[0][0]
    step = code.error_bound(x, first[0], stochastic=True, xp=np)
    # The variance of a rounding is p (1 - p) step^2, at most a quarter of it.
    allowed = SIGMAS * 0.5 * step / np.sqrt(DRAWS) + 2.0**-20
    assert np.all(np.abs(total / DRAWS - x) <= allowed)
    # And it can fail: rounding to nearest is further off than that somewhere.
    assert np.any(np.abs(there_and_back(code, x[None])[0][0] - x) > allowed)


def test_bits_are_the_same_in_every_namespace():
    torch = pytest.importorskip("torch")
    index = np.array([0, 1, 2, 3, 2**31 - 1, -(2**31), -5], np.int32)
    for count, seed, leaf in [(0, 0, 0), (-1, 2**40, 3), (2**31 - 1, -7, 10**6)]:
        with np.errstate(over="ignore"):
            key = stream_key(np.int32(count), seed, leaf, xp=only(np, HASH_WORDS))
            want = random_bits(key, index)
        ours = jax.jit(lambda t, i, s=seed, n=leaf: random_bits(stream_key(t, s, n, xp=jnp), i))(
            jnp.int32(count), index
        )
        key = stream_key(torch.tensor(count, dtype=torch.int32), seed, leaf, xp=torch)
        np.testing.assert_array_equal(want, ours)
        np.testing.assert_array_equal(want, random_bits(key, torch.tensor(index)).numpy())


def test_the_keys_of_many_leaves_are_those_of_each():
    leaves = [0, 1, 5, 3 << 16, -1, -9]
    keys = jax.jit(lambda t, n: stream_key(t, 5, n, xp=jnp))(jnp.int32(9), jnp.int32(leaves))
    with np.errstate(over="ignore"):
        want = [stream_key(np.int32(9), 5, leaf, xp=np) for leaf in leaves]
    np.testing.assert_array_equal(keys, want)


@pytest.mark.parametrize("along", ["elements", "steps", "leaves", "seeds"])
def test_upper_bits_are_even_and_independent_whatever_is_counted(along):
    n = 2**14
    ticks = np.arange(n, dtype=np.int32)
    with np.errstate(over="ignore"):
        if along == "elements":
            bits = random_bits(stream_key(np.int32(9), 0, 0, xp=np), ticks)
        elif along == "steps":
            bits = random_bits(stream_key(ticks, 0, 0, xp=np), np.int32(77))
        else:
            keys = [
                stream_key(np.int32(9), *((0, i) if along == "leaves" else (i, 0)), xp=np)
                for i in range(n)
            ]
            bits = random_bits(np.array(keys, np.int32), np.int32(77))
    assert len(np.unique(bits)) > n - 64, "collisions of n numbers among 2^32: n^2 / 2^33 expected"
    upper = (bits[:, None] >> np.arange(9, 32)) & 1
    # 23 means, 253 pairs and 23 lags, each normal: 1 in 10^9 sets of bits has one beyond 7 sigma.
    limit = 7 * 0.5 / np.sqrt(n)
    assert np.all(np.abs(upper.mean(0) - 0.5) < limit)
    centred = upper - 0.5
    pairs = centred.T @ centred / n - 0.25 * np.eye(23)
    assert np.all(np.abs(pairs) < limit / 2)
    assert np.all(np.abs((centred[1:] * centred[:-1]).mean(0)) < limit / 2)


def test_counters_seeds_and_leaves_give_streams_of_their_own():
    index = np.arange(4096, dtype=np.int32)
    with np.errstate(over="ignore"):
        streams = [
            random_bits(stream_key(np.int32(t), s, n, xp=np), index)
            for t, s, n in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
        ]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 7 / np.sqrt(4096)


@settings(max_examples=200, deadline=None)
@given(x=st.floats(width=32), bits=st.integers(-(2**31), 2**31 - 1))
def test_bfloat16_rounding_goes_to_a_neighbour_and_keeps_what_bfloat16_holds(x, bits):
    x = np.full(1, x, np.float32)
    got = round_to_bfloat16(x, np.full(1, bits, np.int32), xp=only(np, HASH_WORDS))
    if not np.isfinite(x[0]):
        np.testing.assert_array_equal(got, x)
        return
    below = (x.view(np.int32) & -0x10000).view(np.float32)
    with np.errstate(over="ignore"):
        above = (below.view(np.int32) + 0x10000).view(np.float32)
    assert got[0] in (below[0], above[0])
    if x[0] == below[0]:
        assert got[0] == x[0]


def test_bfloat16_rounding_has_exactly_the_right_odds():
    x = np.float32(1.0) + np.float32(2.0**-12)  # a thirty-second of the way to the next
    every = (np.arange(2**16, dtype=np.int64) * 2**16).astype(np.uint32).view(np.int32)
    got = round_to_bfloat16(np.full(2**16, x), every, xp=np)
    assert got.astype(np.float64).mean() == float(x)


def test_nibbles_come_back():
    low, high = (x.ravel().astype(np.uint8) for x in np.meshgrid(np.arange(16), np.arange(16)))
    packed = pack(low, high)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(unpack(packed), (low, high))


@pytest.mark.parametrize("bits", [2, 16, "8", None])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"bits must be 8 or 4, got .*; use 8"):
        BlockCode(bits, True)
