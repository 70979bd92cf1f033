"""The self-driving law and its parts, in JAX: what is sensed, how it steers, what it refuses."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from cruxy_control import Meta3, SelfDriving, Signals
from cruxy_control.formulas.averaging import averaging_weight
from cruxy_control.formulas.limits import limit_scale, relative_limit
from cruxy_control.signals import NOT_KNOWN
from cruxy_optax import (
    LayerStack,
    average_iterates,
    averaged_params,
    axiom,
    cosmic,
    limit_relative_step,
    release_gradients,
    scale_by_controlled_adam,
    scale_by_meta_learning_rate,
    scale_by_tiers,
    self_driving,
    self_driving_lion,
    stabilize,
    telemetry,
)
from inexact import dividing
from optimizers import gradients, train, tree
from relatives import crossed

ONE = np.float32(1.0)
Low = dividing(-1)


def stepped(law, state, alignment, limit=1.0, norm=1.0):
    signals = Signals(np.float32(norm), ONE, ONE, np.float32(alignment), np.float32(limit))
    return law.step(state, signals, xp=np)


def started(law):
    return law.init(np.float32(0.0), xp=np)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("noise", [0.1, 10.0])
def test_projection_on_a_noisy_quadratic_is_minus_half_the_rate_in_units_of_the_curvature(
    decay, noise
):
    # E<g_t, m_{t-1}> = -(rate h / 2) E m^2, whatever the noise and the momentum.
    curvature, rate, steps = 2.0, 0.3, 400_000
    rng = np.random.default_rng(0)
    x, m, along, length = np.zeros(64), np.zeros(64), 0.0, 0.0
    for t in range(steps // 64):
        g = curvature * x + noise * rng.normal(size=64)
        if t > 20 / (1 - decay):
            along, length = along + g @ m, length + m @ m
        m = decay * m + (1 - decay) * g
        x = x - rate * m
    # The standard error of the quotient is below a tenth of this at every setting (20 seeds).
    assert along / length == pytest.approx(-rate * curvature / 2, rel=0.15, abs=0.02)


@pytest.mark.parametrize("step_of", [np.sign, np.tanh, lambda m: np.sign(m) * np.abs(m) ** 0.3])
def test_along_any_step_it_is_minus_half_the_rate_times_the_curvature_along_that_step(step_of):
    # E<g_t, d_{t-1}> = -(rate / 2) E d'Hd for x_{t+1} = x_t - rate d_t, whatever d is made of.
    curvature, rate = np.linspace(0.5, 2.0, 256), 0.3
    rng = np.random.default_rng(0)
    x, m, along, length = np.zeros(256), np.zeros(256), 0.0, 0.0
    for t in range(4000):
        g = curvature * x + rng.normal(size=256)
        step = step_of(m)
        if t > 500:
            along, length = along + g @ step, length + step @ (curvature * step)
        m = 0.9 * m + 0.1 * g
        x = x - rate * step_of(m)
    assert along / length == pytest.approx(-rate / 2, rel=0.15)


def test_rate_grows_by_the_gain_while_gradients_agree_and_falls_while_they_oppose():
    law = SelfDriving(gain=1.0, gain_time=20.0)
    state, controls = stepped(law, started(law), np.nan)
    assert controls.meta_scale == 1.0  # no momentum before the first step
    state, controls = stepped(law, state, 1.0)
    assert controls.meta_scale == pytest.approx(np.exp(20 / 22), rel=1e-6)
    _, controls = stepped(law, started(law), -1.0)
    assert controls.meta_scale == pytest.approx(np.exp(-0.75 * 20 / 21), rel=1e-6)


def test_rate_stands_still_at_the_set_point():
    law = SelfDriving(set_point=-0.3)
    state = started(law)
    for _ in range(50):
        state, controls = stepped(law, state, -0.3)
    assert controls.meta_scale == pytest.approx(1.0, abs=1e-5)


def test_gain_lets_the_rate_move_by_the_same_factor_in_every_doubling():
    law = SelfDriving(scale_bounds=(0.0, 1e30), gain=0.1)
    state, scales = started(law), {}
    for t in range(1, 3201):
        state, _ = stepped(law, state, 1.0)
        scales[t] = float(state.scale)
    doublings = [np.log(scales[2 * t] / scales[t]) for t in (400, 800, 1600)]
    np.testing.assert_allclose(doublings, 2.0 * np.log(2.0), rtol=0.05)


def test_what_is_not_known_or_not_finite_moves_nothing():
    law = SelfDriving()
    state = started(law)
    for _ in range(5):
        state, _ = stepped(law, state, 0.5)
    held, controls = stepped(law, state, np.nan)
    assert controls.ok
    assert held.scale == state.scale
    assert held.alignment == state.alignment
    skipped, controls = stepped(law, state, 0.5, norm=np.nan)
    assert not controls.ok
    jax.tree.map(np.testing.assert_array_equal, skipped, state)


def test_rate_that_no_tensor_followed_is_taken_back_at_once():
    law = SelfDriving(gain=0.0)
    _, controls = stepped(law, started(law), 0.9, limit=0.01)
    assert controls.meta_scale == pytest.approx(0.01)


def test_a_limit_that_does_not_bind_leaves_one_to_the_bit_wherever_it_is_divided():
    x = np.float32([0.1, 0.3, 0.5]).view(Low)
    assert (x / x < 1.0).all()
    assert np.array_equal(limit_scale(x, x, xp=np), np.ones(3))
    assert np.array_equal(limit_scale(2 * x, x, xp=np), np.ones(3))
    np.testing.assert_allclose(limit_scale(x, 2 * x, xp=np), 0.5, rtol=1e-6)
    nan = np.float32([np.nan]).view(Low)
    assert np.isnan(limit_scale(nan, x[:1], xp=np))
    assert limit_scale(x[:1], nan, xp=np) == 1.0


def test_a_schedule_that_stands_still_is_none_wherever_it_is_divided():
    law, low = SelfDriving(), np.float32([0.3]).view(Low)
    one = np.ones(1, np.float32).view(Low)
    state = law.init(one, xp=np)
    for _ in range(3):
        state, controls = law.step(state, Signals(one, one, one, one, one, low), xp=np)
    assert controls.schedule_scale == 1.0
    _, controls = law.step(state, Signals(one, one, one, one, one, low / 2), xp=np)
    assert 0.4 < controls.schedule_scale < 0.6


def test_law_learns_nothing_from_a_step_after_which_nothing_had_moved():
    law = SelfDriving()
    state = started(law)
    for _ in range(5):
        state, _ = stepped(law, state, 0.5)
    held, controls = stepped(law, state, 0.9, limit=0.0)
    assert controls.ok
    assert (held.scale, held.alignment, held.step) == (state.scale, state.alignment, state.step)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"set_point": -1.0}, r"set_point must be in \(-1, 1\), got -1.0"),
        ({"alignment_decay": 1.0}, r"alignment_decay must be in \[0, 1\), got 1.0"),
        ({"gain": -1.0}, r"gain must be in \[0, infinity\), got -1.0"),
        ({"gain_time": 0.0}, r"gain_time must be in \(0, infinity\), got 0.0"),
        ({"scale_bounds": (2.0, 3.0)}, r"scale_bounds must contain 1, got \(2.0, 3.0\)"),
    ],
)
def test_law_refuses_constants_outside_their_range(changes, message):
    with pytest.raises(ValueError, match=message):
        SelfDriving(**changes)


def test_average_of_power_zero_is_the_mean_and_a_larger_power_forgets_the_start():
    values = np.random.default_rng(0).normal(size=50)
    for power, weights in ((0.0, np.ones(50)), (1.0, np.arange(1.0, 51.0))):
        mean = 0.0
        for t, value in enumerate(values):
            mean += averaging_weight(t, power, xp=np) * (value - mean)
        assert mean == pytest.approx(np.average(values, weights=weights))


def test_relative_limit_is_a_share_of_the_size_and_of_the_floor():
    sizes = relative_limit(np.array([4.0, 0.0], np.float32), 0.1, 0.01, xp=np)
    np.testing.assert_allclose(sizes, [0.2, 0.001], rtol=1e-6)
    sizes = relative_limit(np.array([4.0, 0.0]), 0.1, 0.01, xp=np, whole=np.float32(1.0))
    np.testing.assert_allclose(sizes, [0.1, 0.001], rtol=1e-6)


def test_alignment_is_the_cosine_with_the_moment_before_the_step():
    tx = self_driving(weight_decay=0.0)
    params = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    rng = np.random.default_rng(0)
    first, second = ({k: rng.normal(size=v.shape) for k, v in params.items()} for _ in range(2))
    _, state = tx.update(first, tx.init(params), params)
    assert state.signals.alignment == NOT_KNOWN
    _, state = tx.update(second, state, params)
    flat = [np.concatenate([g["a"], g["b"].ravel()]) for g in (first, second)]
    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert float(state.signals.alignment) == pytest.approx(cosine, rel=1e-5)
    assert float(telemetry(state)["alignment"]) == pytest.approx(cosine, rel=1e-5)


@pytest.mark.parametrize("inner", [optax.scale_by_adam(), optax.scale_by_lion(), optax.trace(0.9)])
def test_law_senses_the_moments_of_optax_too(inner):
    tx = stabilize(optax.chain(inner, scale_by_meta_learning_rate(1e-3)), SelfDriving())
    params = jnp.arange(1.0, 5.0)
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state, params)
    assert float(state.signals.alignment) == pytest.approx(1.0, abs=1e-5)
    assert float(telemetry(state)["meta_scale"]) > 2.0


def test_law_that_steers_by_the_moment_refuses_a_chain_without_one():
    tx = stabilize(
        optax.chain(optax.scale_by_rms(), scale_by_meta_learning_rate(1e-3)), SelfDriving()
    )
    with pytest.raises(ValueError, match="needs the alignment of gradients with a first moment"):
        tx.init(jnp.ones(3))


def test_law_that_steers_by_the_moment_refuses_moments_under_a_budget():
    message = "law must not steer by the first moment, .* may drop it at the next plan"
    with pytest.raises(ValueError, match=f"{message}, got SelfDriving; use Meta3"):
        cosmic(law=SelfDriving())
    tx = optax.chain(scale_by_tiers("1KB"), scale_by_meta_learning_rate(1e-3))
    with pytest.raises(ValueError, match=f"{message}; use Meta3"):
        stabilize(tx, SelfDriving()).init({"w": jnp.ones(3)})


def test_law_that_steers_by_the_moment_refuses_axiom_without_one():
    with pytest.raises(ValueError, match=r"none without b1, got SelfDriving; give b1=0\.9"):
        axiom(law=SelfDriving())


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_law_steers_axiom_by_its_average_of_normalised_gradients(bits):
    tx = axiom(b1=0.9, momentum_bits=bits, weight_decay=0.0, law=SelfDriving())
    params = {"w": jnp.ones((64, 64)), "b": jnp.ones(8)}
    grads = jax.tree.map(lambda p: 1.0 + jnp.arange(p.size).reshape(p.shape) % 7, params)
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(grads, state, params)
    # The average of the same u twice is u: the gradient over the root of its factored square.
    square = grads["w"] ** 2
    u = grads["w"] / jnp.sqrt(square.mean(0, keepdims=True) * square.mean(1, keepdims=True))
    moments = [(u * jnp.sqrt(square.mean())).ravel(), jnp.ones(8)]
    flat = [grads["w"].ravel(), grads["b"]]
    along = sum(float(g @ m) for g, m in zip(flat, moments, strict=True))
    lengths = [np.sqrt(sum(float(x @ x) for x in xs)) for xs in (flat, moments)]
    # What a code gives back is off by up to a step of it, 2^(2 - bits) of the largest element.
    assert float(state.signals.alignment) == pytest.approx(
        along / np.prod(lengths), abs=max(1e-3, 2.0 ** (2 - bits))
    )


def test_moment_that_is_no_tree_like_the_parameters_is_named():
    class Odd(NamedTuple):
        first_moment: Any

    inner = optax.GradientTransformation(lambda _: Odd(jnp.ones(3)), lambda u, s, p: (u, s))
    with pytest.raises(ValueError, match="first_moment of Odd must be a tree like the parameters"):
        stabilize(inner, SelfDriving()).init({"w": jnp.ones(3)})


def test_release_refuses_a_law_that_steers_by_the_moment():
    with pytest.raises(ValueError, match="steers by the alignment"):
        release_gradients(self_driving(), *[lambda *_: 0.0] * 3)


def least_squares(start, make, steps):
    rng = np.random.default_rng(3)
    features = jnp.asarray(rng.normal(size=(256, 16)) * np.geomspace(0.1, 3.0, 16), jnp.float32)
    truth = jnp.asarray(rng.normal(size=16), jnp.float32)
    noise = jnp.asarray(rng.normal(size=256), jnp.float32)

    def loss_fn(params, rows):
        return jnp.mean((features[rows] @ params - (features @ truth + noise)[rows]) ** 2)

    tx = make(start, weight_decay=0.0)

    def step(carry, rows):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, rows)
        updates, state = tx.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), None

    draws = jnp.asarray(rng.integers(0, 256, (steps, 32)))
    params = jnp.zeros(16)
    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), draws)
    everything = jnp.arange(256)
    floor = float(loss_fn(jnp.linalg.lstsq(features, features @ truth + noise)[0], everything))
    return float(loss_fn(averaged_params(state, params), everything)) / floor


# Parameters that start at zero grow by a hundredth a step at most under Lion's limit.
@pytest.mark.parametrize(("make", "steps"), [(self_driving, 400), (self_driving_lion, 2000)])
def test_every_start_over_seven_decades_ends_near_the_best_solution(make, steps):
    ends = [least_squares(start, make, steps) for start in (1e-6, 1e-3, 10.0)]
    assert max(ends) < 1.1  # times the loss of the best solution; the start has 150 times it
    assert max(ends) - min(ends) < 0.05


def test_relative_limit_bounds_tensors_by_their_own_size_and_the_rate_by_that_of_all():
    tx = self_driving(100.0, weight_decay=0.0, relative_limit=0.1, law=SelfDriving(gain=0.0))
    params = {"large": jnp.full(4, 2.0), "small": jnp.full(12, 0.5), "zero": jnp.zeros(4)}
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(grads, tx.init(params), params)
    whole = np.sqrt((4 * 4.0 + 12 * 0.25) / 20)
    for name, size in (("large", 0.1 * whole), ("small", 0.05), ("zero", 0.001)):
        np.testing.assert_allclose(updates[name], -size, rtol=1e-5)
    _, state = tx.update(grads, state, params)
    assert float(telemetry(state)["meta_scale"]) == pytest.approx(0.001 * whole)


def test_relative_limit_of_a_tensor_survives_another_that_is_not_finite():
    tx = self_driving(100.0, weight_decay=0.0, relative_limit=0.1, law=SelfDriving(gain=0.0))
    for bad in (np.nan, 1e30):  # the square of the second is infinite
        params = {"fine": jnp.full(4, 2.0), "bad": jnp.full(4, bad)}
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        np.testing.assert_allclose(updates["fine"], -0.2, rtol=1e-5)


def rms(x):
    return float(jnp.sqrt(jnp.mean(x**2)))


def test_step_of_any_optimizer_is_limited_by_the_size_of_each_tensor():
    params = {"large": jnp.full(4, 2.0), "small": jnp.array([0.5, -0.5]), "zero": jnp.zeros(4)}
    grads = jax.tree.map(lambda p: jnp.linspace(1.0, 2.0, p.size), params)
    free = optax.adamw(100.0, weight_decay=0.0)
    tx = optax.chain(free, limit_relative_step(0.1))
    updates, _ = tx.update(grads, tx.init(params), params)
    unlimited, _ = free.update(grads, free.init(params), params)
    for name, size in (("large", 0.2), ("small", 0.05), ("zero", 0.001)):
        assert rms(updates[name]) == pytest.approx(size, rel=1e-5)
        np.testing.assert_allclose(updates[name] / size, unlimited[name] / 100.0, rtol=1e-4)


def test_step_below_the_limit_is_left_as_it_is_and_no_dtype_changes():
    params = {"w": jnp.ones(3), "half": jnp.ones(3, jnp.bfloat16), "none": jnp.zeros((0, 2))}
    updates = jax.tree.map(lambda p: 0.01 * p, params)
    limited, _ = limit_relative_step(0.1).update(updates, optax.EmptyState(), params)
    jax.tree.map(np.testing.assert_array_equal, limited, updates)
    assert [x.dtype for x in limited.values()] == [x.dtype for x in updates.values()]


def test_relative_limit_leaves_masked_tensors_alone():
    params = {"w": jnp.ones(3), "b": jnp.ones(3)}
    tx = optax.masked(limit_relative_step(0.1), {"w": True, "b": False})
    updates, _ = tx.update(jax.tree.map(lambda p: 9.0 * p, params), tx.init(params), params)
    np.testing.assert_allclose(updates["w"], 0.1, rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], 9.0)


@pytest.mark.parametrize(
    ("bad", "limited"),
    [
        ([1.0, np.nan, 5.0], [1.0, np.nan, 5.0]),
        ([1.0, np.inf, 5.0], [0.0, np.nan, 0.0]),
        ([1e30, 1e30, 1e30], [0.0, 0.0, 0.0]),
    ],
)
def test_relative_limit_hides_nothing_that_is_not_finite_and_moves_nothing_that_overflows(
    bad, limited
):
    update, params = {"w": jnp.array(bad)}, {"w": jnp.ones(3)}
    updates, _ = limit_relative_step().update(update, optax.EmptyState(), params)
    np.testing.assert_array_equal(updates["w"], limited)


def test_training_from_a_rate_far_too_high_is_held_by_the_limit_alone():
    target = jnp.array([1.0, -2.0, 0.5])

    def end(tx):
        params = {"x": jnp.ones(3)}
        state = tx.init(params)
        for _ in range(300):
            grads = {"x": 2.0 * (params["x"] - target)}
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return rms(params["x"] - target)

    assert not end(optax.sgd(1.5)) < 1e6
    assert end(optax.chain(optax.sgd(1.5), limit_relative_step(0.1))) < 0.5


def test_relative_limit_refuses_what_it_cannot_measure():
    for arguments in ({"limit": 0.0}, {"limit": -1.0}, {"floor": 0.0}, {"limit": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            limit_relative_step(**arguments)
    with pytest.raises(ValueError, match="params=None"):
        limit_relative_step().update({"w": jnp.ones(2)}, optax.EmptyState())


def test_frozen_model_holds_the_rate_and_goes_on_when_it_thaws():
    tx = self_driving(1e-3, weight_decay=0.0)
    params = {"w": jnp.ones(4)}
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state, params)
    before = float(telemetry(state)["meta_scale"])
    for _ in range(5):
        _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert float(telemetry(state)["meta_scale"]) == before
    _, state = tx.update(params, state, params)
    assert float(telemetry(state)["meta_scale"]) > before


def noisy_regression(make, pause, at, steps=300):
    """Factors and losses of a run whose schedule is 0 for `pause` steps, which are left out."""
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(256, 16)) * np.geomspace(0.3, 2.0, 16), jnp.float32)
    targets = jnp.asarray(rng.normal(size=256), jnp.float32) + features @ jnp.ones(16)
    draws = rng.integers(0, 256, (steps, 32))
    draws = np.concatenate([draws[:at], rng.integers(0, 256, (pause, 32)), draws[at:]])
    tx = make(lambda count: jnp.where((count >= at) & (count < at + pause), 0.0, 1e-3))

    def loss_fn(params, rows):
        return jnp.mean((features[rows] @ params - targets[rows]) ** 2)

    def step(carry, rows):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, rows)
        updates, state = tx.update(grads, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        everything = loss_fn(params, jnp.arange(256))
        return (params, state), (state.controls.meta_scale, everything)

    params = jnp.zeros(16)
    (_, state), seen = jax.lax.scan(step, (params, tx.init(params)), jnp.asarray(draws))
    factors, losses = (np.delete(np.asarray(x), np.arange(at, at + pause)) for x in seen)
    return factors, losses, int(state.law_state.step)


@pytest.mark.parametrize(("make", "pause"), crossed([self_driving, self_driving_lion], [20, 100]))
def test_run_goes_on_after_a_schedule_of_zero_as_it_would_have_without(make, pause):
    straight, losses, steps = noisy_regression(make, 0, 150)
    paused, losses_paused, steps_paused = noisy_regression(make, pause, 150)
    np.testing.assert_allclose(paused, straight, rtol=0.05)
    np.testing.assert_allclose(losses_paused, losses, rtol=0.3)  # of noise; it was 28-fold
    assert steps_paused == steps


def part_of_the_tensors_trained(rest):
    """Factors of a run that moves one tensor of two, the other with what `rest` is."""

    def driven(rate):
        return optax.chain(
            scale_by_controlled_adam(b2=0.99),
            scale_by_meta_learning_rate(rate, relative_limit=0.1),
        )

    labels = {"a": "trained", "b": "rest"}
    tx = stabilize(
        optax.partition({"trained": driven(1e-3), "rest": rest(driven)}, labels), SelfDriving()
    )
    params = {"a": jnp.ones(8), "b": jnp.ones(3)}
    state, factors, update = tx.init(params), [], jax.jit(tx.update)
    for t in range(60):
        noise = jax.random.normal(jax.random.key(t), (8,))
        grads = {"a": params["a"] + 0.3 * noise, "b": 0.5 * params["b"]}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        factors.append(float(telemetry(state)["meta_scale"]))
    return factors


def test_tensors_at_a_rate_of_zero_change_nothing_for_the_others():
    frozen = part_of_the_tensors_trained(lambda _: optax.set_to_zero())
    at_zero = part_of_the_tensors_trained(lambda driven: driven(0.0))
    np.testing.assert_allclose(at_zero, frozen, rtol=1e-5)


def test_search_does_not_start_at_a_rate_of_zero():
    for make in (self_driving, self_driving_lion):
        with pytest.raises(ValueError, match=r"learning_rate must be in \(0, .*, got 0"):
            make(learning_rate=0.0)


def test_spike_moves_the_rate_by_no_more_than_any_other_step():
    tx = self_driving(1e-3, weight_decay=0.0)
    params = {"w": jnp.ones(4)}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(200):
        _, state = update({"w": jnp.array([1.0, -1.0, 1.0, -1.0])}, state, params)
    before = telemetry(state)
    _, state = update({"w": jnp.array([-1e6, 1e6, -1e6, 1e6])}, state, params)
    after = telemetry(state)
    # One of about ten observations in the average, and a gain of 20 / 220.
    assert 0.8 < float(after["meta_scale"] / before["meta_scale"]) < 1.2


def changing_data(tx, jump, steps=500, extra=400):
    """Noisy gradients around one optimum, then around `jump` times it: rates, errors, average."""
    first = jnp.ones(20)

    def step(carry, t):
        x, state = carry
        optimum = jnp.where(t < steps, first, jump * first)
        noise = 0.3 * jax.random.normal(jax.random.fold_in(jax.random.key(0), t), x.shape)
        updates, state = tx.update(x - optimum + noise, state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), (telemetry(state)["learning_rate"], jnp.abs(x - optimum).max())

    start = 2.0 * first, tx.init(first)
    (x, state), (rates, errors) = jax.lax.scan(step, start, jnp.arange(steps + extra))
    return rates, errors, averaged_params(state, x)


@pytest.mark.parametrize(("jump", "rise"), [(5.0, 2.0), (-5.0, 2.0), (50.0, 10.0)])
def test_rate_rises_at_a_change_of_data_until_the_new_ones_are_learned(jump, rise):
    rates, errors, average = changing_data(self_driving(weight_decay=0.0), jump)
    assert float(errors[500]) > 3.0
    assert float(rates[500:].max()) > rise * float(rates[499])
    assert float(errors[650:].max()) < 1.0
    np.testing.assert_allclose(average, jump, atol=0.2)


def test_rate_that_rose_far_falls_again():
    rates, _, _ = changing_data(self_driving(weight_decay=0.0), 50.0)
    assert float(rates[-1]) < 0.5 * float(rates.max())


def test_rate_that_is_held_does_not_follow_a_change_of_data():
    settled = float(changing_data(self_driving(weight_decay=0.0), 50.0)[0][499])
    held = self_driving(settled, weight_decay=0.0, relative_limit=None, law=SelfDriving(gain=0.0))
    assert float(changing_data(held, 50.0)[1][-1]) > 5.0


def test_skipped_step_leaves_average_scale_and_limit_as_they_were():
    tx = self_driving(0.1)
    grads, losses = gradients(4)
    params, state = train(tx, tree(), grads, losses)
    bad = jax.tree.map(lambda g: jnp.full_like(g[0], jnp.nan), grads)
    _, after = tx.update(bad, state, params, value=1.0)
    assert int(after.skipped_total) == 1
    jax.tree.map(
        np.testing.assert_array_equal,
        averaged_params(after, params),
        averaged_params(state, params),
    )
    assert after.law_state.scale == state.law_state.scale


def test_average_is_kept_in_float32_and_comes_back_in_the_parameters_dtype():
    tx = self_driving()
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    state = tx.init(params)
    averages = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4,)]
    assert [leaf.dtype for leaf in averages].count(jnp.float32) == 2  # nu and the average
    assert averaged_params(state, params)["w"].dtype == jnp.bfloat16


def nested(tx):
    return {
        "chain": optax.chain(optax.identity(), tx),
        "masked": optax.masked(tx, {"a": True, "b": False}),
        "partition": optax.partition({"x": tx, "y": optax.sgd(0.1)}, {"a": "x", "b": "y"}),
        "accumulated": optax.MultiSteps(tx, 1),
        "injected": optax.inject_hyperparams(lambda rate: self_driving(rate))(rate=1e-2),
    }


@pytest.mark.parametrize("name", nested(optax.identity()))
def test_averages_are_found_through_any_nesting(name):
    tx = optax.with_extra_args_support(nested(self_driving(1e-2, averaging=0.0))[name])
    if name == "accumulated":
        tx = optax.MultiSteps(self_driving(1e-2, averaging=0.0), 1)
    params = {"a": jnp.arange(1.0, 4.0), "b": jnp.ones(2)}
    state = tx.init(params)
    seen = []
    for _ in range(3):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    average = averaged_params(state, params)
    if name != "injected":
        np.testing.assert_allclose(average["a"], np.mean([p["a"] for p in seen], 0), rtol=1e-5)
    if name in ("masked", "partition"):
        assert average["b"] is params["b"]


def test_averages_are_found_in_a_train_state_and_an_nnx_optimizer():
    params = {"w": jnp.ones(3)}
    linen = TrainState.create(apply_fn=None, params=params, tx=self_driving())
    linen = linen.apply_gradients(grads=params)
    np.testing.assert_allclose(averaged_params(linen, linen.params)["w"], linen.params["w"])

    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, self_driving(), wrt=nnx.Param)
    before = nnx.state(model, nnx.Param)
    optimizer.update(model, before)
    now = nnx.state(model, nnx.Param)
    average = averaged_params(optimizer.opt_state, now)
    jax.tree.map(np.testing.assert_allclose, average, now)
    nnx.update(model, average)


def averages_of(params):
    return self_driving().init(params)


@pytest.mark.parametrize(
    ("state", "params", "message"),
    [
        (
            averages_of({"a": jnp.ones(3)}),
            {"model": {"a": jnp.ones(3)}},
            r"1 averages of which there is no parameter, such as \['a'\]",
        ),
        (
            optax.flatten(self_driving()).init({"a": jnp.ones(3), "b": jnp.ones(2)}),
            {"a": jnp.ones(3), "b": jnp.ones(2)},
            "1 averages of which there is no parameter, such as params itself",
        ),
        (
            averages_of({"a": jnp.ones(3)}),
            {"a": jnp.ones(3), "b": jnp.ones(3)},
            r"1 parameters of which there is no average, such as \['b'\]",
        ),
        (
            averages_of({"a": jnp.ones(3)}),
            {"a": jnp.ones(1)},
            r"1 parameters of another shape than their average, such as \['a'\]",
        ),
        (
            optax.masked(self_driving(), {"a": True, "b": False}).init(
                {"a": jnp.ones(3), "b": jnp.ones(3)}
            ),
            {"a": jnp.ones(3), "c": jnp.ones(3)},
            r"1 parameters of which there is no average, such as \['c'\]",
        ),
    ],
)
def test_averages_that_do_not_belong_to_the_parameters_are_named(state, params, message):
    with pytest.raises(ValueError, match=message):
        averaged_params(state, params)


def test_what_a_mask_of_a_whole_branch_leaves_out_comes_back_as_it_is():
    params = {"a": jnp.ones(3), "b": {"c": jnp.ones(2), "d": jnp.ones(4)}}
    tx = optax.masked(self_driving(), {"a": True, "b": False})
    updates, state = tx.update(params, tx.init(params), params)
    average = averaged_params(state, optax.apply_updates(params, updates))
    assert float(average["a"][0]) < 1.0
    np.testing.assert_array_equal(average["b"]["c"], 2.0)  # its gradient, unchanged by the mask


def test_averages_of_released_gradients_are_those_of_an_ordinary_step():
    def embed_fn(embed, batch):
        return batch @ embed["e"]

    def layer_fn(layer, x, batch):
        return x + jnp.tanh(x @ layer)

    def loss_fn(head, embed, x, batch):
        return jnp.mean((x @ head - 1.0) ** 2)

    tx = stabilize(
        optax.chain(optax.sgd(0.1), average_iterates(0.0)), law=Meta3(clip_threshold=None)
    )
    params = LayerStack({"e": 0.1 * jnp.ones((3, 4))}, 0.1 * jnp.ones((2, 4, 4)), jnp.ones((4, 1)))
    released = release_gradients(tx, embed_fn, layer_fn, loss_fn)
    state, seen = released.init(params), []
    for _ in range(3):
        params, state, _ = released.step(params, state, jnp.ones((8, 3)))
        seen.append(params)
    mean = jax.tree.map(lambda *steps: jnp.stack(steps).mean(0), *seen)
    for got, wanted in zip(
        jax.tree.leaves(averaged_params(state, params)), jax.tree.leaves(mean), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_averages_are_refused_where_there_are_none():
    params = jnp.ones(3)
    with pytest.raises(ValueError, match="needs a state with an average in it"):
        averaged_params(self_driving(averaging=None).init(params), params)
    with pytest.raises(ValueError, match=r"power must be in \[0, infinity\), got -1"):
        average_iterates(-1)
    tx = average_iterates()
    with pytest.raises(ValueError, match="but got params=None"):
        tx.update(params, tx.init(params))
    limited = self_driving(averaging=None, weight_decay=0.0)
    with pytest.raises(ValueError, match="relative limit measures the parameters"):
        limited.update(params, limited.init(params))
    with pytest.raises(ValueError, match=r"relative_limit must be in \(0, infinity\), got 0"):
        self_driving(relative_limit=0.0)


def test_low_bit_moments_are_sensed_as_what_they_stand_for():
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 128)), jnp.float32)}
    grads = jax.tree.map(lambda p: p + 0.5, params)
    shown = {}
    for bits in (32, 8):
        tx = self_driving(1e-3, state_bits=bits)
        state = tx.init(params)
        for _ in range(3):
            _, state = tx.update(grads, state, params)
        shown[bits] = float(state.signals.alignment)
    assert shown[32] == pytest.approx(1.0, abs=1e-5)
    assert shown[8] == pytest.approx(1.0, abs=2e-3)


def test_state_is_two_moments_and_the_average_or_less():
    params = {"w": jnp.zeros((128, 128))}

    def per_parameter(tx):
        return sum(x.nbytes for x in jax.tree.leaves(tx.init(params))) / 128**2

    assert per_parameter(self_driving()) == pytest.approx(12.0, abs=0.05)
    assert per_parameter(self_driving(averaging=None)) == pytest.approx(8.0, abs=0.05)
    assert per_parameter(self_driving_lion()) == pytest.approx(8.0, abs=0.05)
    assert per_parameter(self_driving_lion(averaging=None)) == pytest.approx(4.0, abs=0.05)


def test_moments_of_one_part_alone_are_compared_with_its_gradients_alone():
    tx = stabilize(
        optax.chain(
            optax.partition(
                {"adam": scale_by_controlled_adam(), "sgd": optax.identity()},
                {"a": "adam", "b": "sgd"},
            ),
            scale_by_meta_learning_rate(1e-3),
        ),
        SelfDriving(),
    )
    params = {"a": jnp.arange(1.0, 4.0), "b": jnp.ones(3)}
    state = tx.init(params)
    for sign in (1.0, -1.0, 1.0):
        _, state = tx.update({"a": params["a"], "b": sign * params["b"]}, state, params)
    assert float(state.signals.alignment) == pytest.approx(1.0, abs=1e-5)
