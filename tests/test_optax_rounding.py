"""`round_updates`: bfloat16 parameters move as float32 ones do, on average and exactly as said."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cruxy_optax import (
    clip_by_predicted_norm,
    meta3,
    quantize_state,
    round_updates,
    scale_by_controlled_adam,
    scale_by_meta_learning_rate,
    stabilize,
    telemetry,
    throttle_by_phase,
)
from low_bit import coded
from optimizers import assert_same
from relatives import crossed, relatives

SIZE, STEPS, RATE = 4096, 200, 1e-3


def outside(rate=RATE, **options):
    """The controller around the rounding."""
    inner = optax.chain(
        clip_by_predicted_norm(),
        scale_by_controlled_adam(),
        throttle_by_phase(),
        scale_by_meta_learning_rate(rate),
    )
    return stabilize(round_updates(inner, **options))


ROUNDED = {
    "adamw": lambda **o: round_updates(optax.adamw(RATE), **o),
    "meta3": lambda **o: round_updates(meta3(RATE), **o),
    "meta3_outside": lambda **o: outside(**o),
    "meta3_8_bits": lambda **o: round_updates(meta3(RATE, state_bits=8), **o),
    "all_quantized": lambda **o: quantize_state(round_updates(meta3(RATE), **o)),
}
PLAIN = {
    "adamw": lambda: optax.adamw(RATE),
    "meta3": lambda: meta3(RATE),
    "meta3_outside": lambda: meta3(RATE, weight_decay=0.0),
    "meta3_8_bits": lambda: meta3(RATE, state_bits=8),
    "all_quantized": lambda: meta3(RATE, state_bits=8),
}
SOME = ("adamw", "meta3", "meta3_8_bits")
some_optimizers = pytest.mark.parametrize("name", relatives(ROUNDED, SOME))
either_method = pytest.mark.parametrize("method", ["stochastic", "kahan"])


def ones(dtype=jnp.bfloat16):
    return {"w": jnp.ones((SIZE // 64, 64), dtype)}


def train(tx, params, steps=STEPS):
    """A steady, slightly noisy gradient of 1."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def run(params):
        def body(carry, key):
            params, state = carry
            noise = 1.0 + 0.3 * jax.random.normal(key, params["w"].shape)
            updates, state = tx.update({"w": noise.astype(params["w"].dtype)}, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(0), steps)
        return jax.lax.scan(body, (params, tx.init(params)), keys)[0]

    return run(params)


@some_optimizers
def test_bfloat16_weights_near_1_do_not_move_without_it(name):
    params, _ = train(PLAIN[name](), ones())
    np.testing.assert_array_equal(params["w"], 1.0)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *crossed(ROUNDED, ["stochastic"], fast=[(name, "stochastic") for name in SOME]),
        pytest.param("adamw", "kahan", marks=pytest.mark.slow),
        ("meta3_outside", "kahan"),
    ],
)
def test_with_it_they_follow_the_float32_run(name, method):
    want = np.asarray(train(PLAIN[name](), ones(jnp.float32))[0]["w"], np.float64)
    got = np.asarray(train(ROUNDED[name](method=method), ones())[0]["w"], np.float64)
    assert want.mean() < 0.9
    # Below 1 the steps of bfloat16 are 2^-8. A stochastic rounding has at most a quarter of a
    # step squared as variance, of which 200 are added; Kahan's sum is off by half a step at most.
    # Feedback through weight decay is RATE * 1e-4 a step and does not count; gradients in bfloat16
    # are within 2^-9 of the float32 ones, which moves Adam's ratio by less than 1 % of 0.2.
    spread = 2.0**-8 * 0.5 * math.sqrt(STEPS / SIZE) if method == "stochastic" else 0.0
    assert abs(got.mean() - want.mean()) < 6 * spread + 0.01 * 0.2
    if method == "kahan":
        assert np.all(np.abs(got - want) <= 2.0**-9 + 0.03 * 0.2)


@either_method
@pytest.mark.parametrize("where", ["alone", "inside", "outside"])
def test_apply_updates_lands_exactly_on_what_was_rounded_to(method, where):
    """Whatever the sizes of parameter and update: the sum is one of two bfloat16 neighbours."""
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.uniform(-6, 6, (2, 4096))
    p = jnp.asarray(rng.normal(size=4096) * sizes[0], jnp.bfloat16)
    u = jnp.asarray(rng.normal(size=4096) * sizes[1], jnp.float32)
    ask = optax.stateless(lambda updates, params: u)
    tx = {
        "alone": lambda: round_updates(ask, method),
        "inside": lambda: round_updates(stabilize(ask), method),
        "outside": lambda: stabilize(round_updates(ask, method)),
    }[where]()
    updates, _ = tx.update(jnp.ones_like(p), tx.init(p), p)
    assert updates.dtype == jnp.float32
    landed = optax.apply_updates(p, updates)
    assert landed.dtype == jnp.bfloat16
    exact = p.astype(jnp.float32) + u
    below = np.asarray(exact).view(np.int32) & -0x10000
    neighbours = np.stack([below, below + 0x10000]).view(np.float32)
    got = np.asarray(landed, np.float32)
    assert np.all((got == neighbours[0]) | (got == neighbours[1]))
    np.testing.assert_array_equal(got, np.asarray(p.astype(jnp.float32) + updates), "no rounding")
    if method == "kahan":
        np.testing.assert_array_equal(landed, exact.astype(jnp.bfloat16))


def test_stochastic_rounding_of_the_update_is_unbiased():
    p = jnp.ones(2**16, jnp.bfloat16)
    for share in (0.01, 0.3, 0.5, 0.9):
        u = -share * 2.0**-8
        ask = optax.stateless(lambda updates, params, u=u: jnp.full(params.shape, u))
        tx = round_updates(ask)
        updates, _ = tx.update(p, tx.init(p), p)
        landed = np.asarray(optax.apply_updates(p, updates), np.float64)
        # A binomial share of 65,536: beyond six standard deviations once in 10^9 (four tests of
        # fixed bits).
        allowed = 6 * math.sqrt(share * (1 - share) / 2**16) + 2.0**-16
        assert abs((1.0 - landed.mean()) / 2.0**-8 - share) < allowed


@pytest.mark.parametrize(
    ("name", "method"),
    crossed(["meta3", "meta3_outside", "all_quantized"], ["stochastic", "kahan"]),
)
def test_skipped_step_changes_nothing_and_the_next_one_goes_on(name, method):
    tx = ROUNDED[name](method=method)
    params, state = train(tx, ones(), 20)
    step = jax.jit(tx.update)
    good = jax.tree.map(jnp.ones_like, params)
    bad = {"w": good["w"].at[0, 0].set(jnp.nan)}
    updates, after = step(bad, state, params)
    assert int(telemetry(after)["skipped_total"]) == 1
    assert_same(optax.apply_updates(params, updates), params)
    resumed, unbroken = step(good, after, params), step(good, state, params)
    assert_same(resumed[0], unbroken[0])


def test_same_run_twice_is_the_same_bits_and_another_seed_is_not():
    runs = [train(ROUNDED["meta3"](seed=s), ones(), 10)[0] for s in (0, 0, 1)]
    assert_same(runs[0], runs[1])
    assert np.any(np.asarray(runs[0]["w"] != runs[2]["w"]))


def test_other_dtypes_get_the_plain_update_in_their_own():
    params = {"b": jnp.ones(8, jnp.bfloat16), "f": jnp.ones(8), "h": jnp.ones(8, jnp.float16)}
    tx, plain = round_updates(optax.sgd(0.1)), optax.sgd(0.1)
    updates, _ = tx.update(params, tx.init(params), params)
    assert {k: u.dtype for k, u in updates.items()} == {
        "b": jnp.float32,
        "f": jnp.float32,
        "h": jnp.float16,
    }
    want, _ = plain.update(params, plain.init(params), params)
    np.testing.assert_array_equal(updates["f"], want["f"])
    np.testing.assert_array_equal(updates["h"], want["h"])
    kahan = round_updates(optax.sgd(0.1), "kahan").init(params)
    assert kahan.compensation["f"] is None
    assert kahan.compensation["h"].dtype == jnp.float16


def test_moments_are_float32_and_a_quantized_state_codes_them_alone():
    params = ones()
    inner = round_updates(meta3(RATE)).init(params).inner_state.inner_state[1]
    assert inner.mu["w"].dtype == jnp.float32
    state = quantize_state(round_updates(optax.adam(RATE), "kahan")).init(params)
    assert [p.rsplit(".", 1)[-1] for p in coded(state)] == ["mu['w']", "nu['w']"]
    assert state.inner_state.compensation["w"].dtype == jnp.bfloat16


def test_controllers_without_it_still_return_the_dtype_of_the_parameters():
    params = ones()
    updates, _ = meta3(RATE).update(params, meta3(RATE).init(params), params)
    assert updates["w"].dtype == jnp.bfloat16


def test_wrong_arguments_say_what_to_do():
    with pytest.raises(TypeError, match="inner must be a gradient transformation, got 1"):
        round_updates(1)
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'up'; use 'stochastic'"):
        round_updates(optax.sgd(1.0), "up")
    tx = round_updates(optax.sgd(1.0))
    with pytest.raises(ValueError, match=r"got params=None; call tx.update\(grads, opt_state"):
        tx.update(ones(), tx.init(ones()))
