"""The formulas of soft signs, trust ratios, adaptive clips and partial adaptivity, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cruxy_control.formulas.directions import blend_sign, momentum_share, soften_sign
from cruxy_control.formulas.factored import factored_axes, inverse_power
from cruxy_control.formulas.trust import (
    agc_scale,
    averaged_ratio,
    balance_slices,
    log_average,
    rms_clip_scale,
    trust_ratio,
)
from cruxy_control.signals import root

ROUNDINGS = 16 * 2.0**-24
EDGES = [0.0, -0.0, 1e-38, -3.0, 2.0, 1e30]


def momentum(scale=1.0):
    c = scale * np.random.default_rng(0).normal(size=(7, 5))
    return c, math.sqrt(np.mean(c * c))


@pytest.mark.parametrize("rms", [0.0, 1.0])
def test_temperature_zero_is_the_sign_to_the_bit(rms):
    c = np.array(EDGES, np.float32)
    np.testing.assert_array_equal(soften_sign(c, 0.0, np.float32(rms), xp=np), np.sign(c))


def test_softsign_is_its_equation():
    c, rms = momentum()
    want = 1.5 * c / (np.abs(c) + 0.5 * rms)
    np.testing.assert_allclose(soften_sign(c, 0.5, rms, xp=np), want, rtol=1e-15)


def test_element_of_the_size_of_the_rms_has_size_one_at_every_temperature():
    for t in (0.0, 0.3, 1.0, 1e6):
        assert soften_sign(np.float64(-2.5), t, 2.5, xp=np) == pytest.approx(-1.0)


def test_large_temperature_is_the_normalised_momentum():
    c, rms = momentum()
    np.testing.assert_allclose(soften_sign(c, 1e9, rms, xp=np), c / rms, rtol=1e-7)


def test_blend_is_its_equation():
    c, rms = momentum()
    want = 0.7 * 2 * c / (np.abs(c) + rms) + 0.3 * c / rms
    np.testing.assert_allclose(blend_sign(c, 0.3, 1.0, rms, xp=np), want, rtol=1e-14)


@pytest.mark.parametrize("weight", [0.0, 0.2, 1.0])
def test_sign_weight_takes_the_sign_out_of_a_blend(weight):
    c, rms = momentum()
    share = momentum_share(weight, 0.25)
    want = (1 - weight) * 0.25 * soften_sign(c, 1.0, rms, xp=np)
    want += (1 - (1 - weight) * 0.25) * c / rms
    np.testing.assert_allclose(blend_sign(c, share, 1.0, rms, xp=np), want, rtol=1e-14)
    assert momentum_share(weight, 0.0) == 1.0


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e6])
def test_scale_of_the_momentum_changes_nothing(scale):
    (c, rms), (large, large_rms) = momentum(), momentum(scale)
    for formula in (
        lambda c, rms: soften_sign(c, 0.7, rms, xp=np),
        lambda c, rms: blend_sign(c, 0.2, 1.0, rms, xp=np),
    ):
        np.testing.assert_allclose(formula(large, large_rms), formula(c, rms), rtol=1e-12)


def test_blend_of_what_has_no_size_is_zero():
    c = np.zeros(3, np.float32)
    np.testing.assert_array_equal(blend_sign(c, 0.2, 1.0, np.float32(0), xp=np), c)


def ratio(p, u, cap=10.0, floor=1e-3):
    return float(trust_ratio(np.float64(p), np.float64(u), cap, floor, xp=np))


def test_trust_ratio_is_that_of_the_norms():
    p, u = np.random.default_rng(1).normal(size=(2, 40))
    p, u = p * 3.0, u * 0.5
    norms = max(np.linalg.norm(p), 1e-3 * math.sqrt(40)) / np.linalg.norm(u)
    assert ratio(np.sqrt(np.mean(p**2)), np.sqrt(np.mean(u**2))) == pytest.approx(min(10.0, norms))


@pytest.mark.parametrize(
    ("p", "u", "want"),
    [
        (6.0, 2.0, 3.0),
        (100.0, 1.0, 10.0),
        (0.0, 1.0, 1e-3),
        (1.0, 0.0, 1.0),
        (0.0, 0.0, 1.0),
        (1.0, 1e-300, 10.0),
        (1.0, math.inf, 0.0),
        (1.0, math.nan, 1.0),
    ],
)
def test_trust_ratio_has_a_cap_and_a_floor(p, u, want):
    assert ratio(p, u) == pytest.approx(want)


def test_average_in_log_space_is_the_weighted_geometric_mean():
    ratios, decay, average, decays = [2.0, 8.0, 0.5], 0.9, 0.0, 1.0
    for r in ratios:
        average, decays = log_average(average, r, decay, xp=np), decays * decay
    weights = np.array([decay**2, decay, 1.0])
    want = math.exp(np.dot(weights, np.log(ratios)) / weights.sum())
    assert averaged_ratio(average, decays, xp=np) == pytest.approx(want, rel=1e-12)


def test_average_survives_a_ratio_of_zero():
    assert math.isfinite(log_average(0.0, 0.0, 0.9, xp=np))


@pytest.mark.parametrize(
    ("g", "p", "want"), [(1.0, 2.0, 0.02), (0.01, 2.0, 1.0), (1.0, 0.0, 1e-5), (0.0, 1.0, 1.0)]
)
def test_agc_lets_a_gradient_be_a_share_of_its_parameter(g, p, want):
    assert agc_scale(np.float64(g), np.float64(p), 0.01, xp=np) == pytest.approx(want)


@pytest.mark.parametrize(("rms", "want"), [(0.0, 1.0), (0.5, 1.0), (4.0, 0.5)])
def test_rms_clip(rms, want):
    assert rms_clip_scale(np.float64(rms), 2.0, xp=np) == want


def test_inverse_power_is_a_partial_root():
    v = np.array([1e-30, 0.25, 1.0, 9e6])
    np.testing.assert_allclose(inverse_power(v, 1.0, xp=np), v**-0.5, rtol=1e-12)
    np.testing.assert_allclose(inverse_power(v, 0.5, xp=np), v**-0.25, rtol=1e-12)
    np.testing.assert_array_equal(inverse_power(v, 0.0, xp=np), np.ones(4))


@pytest.mark.parametrize(
    ("shape", "want"), [((), None), ((50,), None), ((40, 8), None), ((40, 50), (0, 1))]
)
def test_factored_axes(shape, want):
    assert factored_axes(shape, 32) == want


def test_factored_axes_of_equal_ones_are_in_order():
    assert factored_axes((64, 3, 64), 32) == (0, 2)


def balanced(rms, param_rms, steps=1, clip=0.1, bounds=(0.7, 1.3)):
    multipliers, apart = np.ones(len(rms)), 0.0
    rms, param_rms = np.array(rms), np.array(param_rms)
    for _ in range(steps):
        multipliers, apart = balance_slices(multipliers, rms, param_rms / rms, clip, bounds, xp=np)
    return multipliers, float(apart)


def test_dispersion_of_slices_is_its_equation():
    _, apart = balanced([1.0, 1.2, 0.8], [1.0, 1.0, 2.0])
    room = np.log([1.0, 1.0 / 1.2, 2.0 / 0.8])
    want = math.sqrt(0.7 * math.log(1.2 / 0.8) ** 2 + 0.3 * np.ptp(room) ** 2)
    assert apart == pytest.approx(want)


def test_slices_are_pulled_to_the_median():
    multipliers, apart = balanced([1.0, 1.2, 0.9], [1.0, 1.0, 1.0], steps=2000)
    np.testing.assert_allclose(multipliers * [1.0, 1.2, 0.9], 1.0, rtol=2e-3)
    assert apart < 2e-3


def test_slices_of_equal_steps_stay_as_they_are():
    multipliers, apart = balanced([0.5, 0.5, 0.5], [2.0, 2.0, 2.0], steps=10)
    np.testing.assert_array_equal(multipliers, np.ones(3))
    assert apart == 0.0


def test_correction_of_slices_is_clipped_and_bounded():
    rms = [1.0, 100.0, 0.01]
    np.testing.assert_allclose(balanced(rms, [1.0] * 3)[0], [1.0, 0.9, 1.1])
    np.testing.assert_allclose(balanced(rms, [1.0] * 3, steps=20)[0], [1.0, 0.7, 1.3])


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_slice_without_a_direction_changes_nothing(bad):
    ones = np.ones(3)
    got, apart = balance_slices(ones, np.array([1.0, bad, 2.0]), ones, 0.1, (0.7, 1.3), xp=np)
    np.testing.assert_array_equal(got, ones)
    assert apart == 0.0


def root_mean_square(c):
    return root(jnp.mean(c * c), xp=jnp)


DIFFERENTIABLE = {
    "soften": lambda c: soften_sign(c, 1.0, root_mean_square(c), xp=jnp),
    "sign": lambda c: soften_sign(c, 0.0, root_mean_square(c), xp=jnp),
    "blend": lambda c: blend_sign(c, 0.2, 1.0, root_mean_square(c), xp=jnp),
    "trust": lambda c: trust_ratio(
        root_mean_square(c), root_mean_square(c * c), 10.0, 1e-3, xp=jnp
    ),
    "agc": lambda c: agc_scale(root_mean_square(c), root_mean_square(c * c), 0.1, xp=jnp),
    "rms clip": lambda c: rms_clip_scale(root_mean_square(c), 1.0, xp=jnp),
    "power": lambda c: c * inverse_power(c * c + 1e-30, 0.75, xp=jnp),
    "balance": lambda c: balance_slices(
        jnp.ones(3), root_mean_square(c) * jnp.ones(3), jnp.ones(3), 0.1, (0.7, 1.3), xp=jnp
    ),
}


@pytest.mark.parametrize("c", [jnp.zeros(4), jnp.array([0.0, 1.0, -2.0, 0.0])], ids=["0", "some"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivative_is_finite_at_zero(name, c):
    slopes = jax.jacrev(DIFFERENTIABLE[name])(c)
    assert all(bool(jnp.isfinite(slope).all()) for slope in jax.tree.leaves(slopes))


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_float32_of_every_framework_is_near_float64(temperature):
    torch = pytest.importorskip("torch")
    c, rms = momentum()
    want = blend_sign(c, 0.2, temperature, rms, xp=np)
    for xp, array in ((jnp, jnp.float32), (torch, lambda x: torch.tensor(x, dtype=torch.float32))):
        got = blend_sign(array(c), 0.2, temperature, array(rms), xp=xp)
        np.testing.assert_allclose(np.asarray(got), want, rtol=ROUNDINGS)
