"""Bad input is met at the door with the rule, the value and the remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cruxy_control import Meta3, StabilityV2
from cruxy_optax import (
    TelemetryLog,
    average_iterates,
    axiom,
    clip_by_predicted_norm,
    cosmic,
    limit_relative_step,
    meta3,
    meta_lion,
    quantize_state,
    scale_by_controlled_adam,
    scale_by_controlled_lion,
    scale_by_meta_learning_rate,
    self_driving,
    stability_v1,
    stability_v2,
    stabilize,
    telemetry,
    throttle_by_phase,
    tier_plan,
    track_curvature,
    track_gamma_norm,
)

NAN, INF = float("nan"), float("inf")
WRONG = [
    (lambda: meta3(-1e-3), r"learning_rate must be in \[0, infinity\), got -0.001; use about"),
    (lambda: meta3(NAN), r"learning_rate must be in \[0, infinity\), got nan"),
    (lambda: meta3(1e-3, b1=1.0), r"b1 must be in \[0, 1\), got 1.0"),
    (lambda: meta_lion(1e-3, b2=-0.1), r"b2 must be in \[0, 1\), got -0.1"),
    (lambda: meta3(1e-3, eps=-1.0), r"eps must be in \[0, infinity\), got -1.0"),
    (lambda: stability_v1(1e-3, weight_decay=-0.1), r"weight_decay must be in \[0, infinity\)"),
    (lambda: stability_v2(1e-3, bounds=(1.0, 0.1)), r"bounds must have lower <= upper"),
    (lambda: meta3(1e-3, law=Meta3(meta_interval=0)), "meta_interval must be a whole number"),
    (lambda: track_gamma_norm(gamma=0.9), r"gamma must be in \[1, infinity\), got 0.9"),
    (lambda: track_curvature(decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
    (lambda: TelemetryLog(), "needs a path or a writer, got neither"),
    (lambda: meta3(INF), r"learning_rate must be in \[0, infinity\), got inf"),
    (lambda: self_driving(INF), r"learning_rate must be in \(0, infinity\), got inf"),
    (
        lambda: meta_lion(1e-3, weight_decay=INF),
        r"weight_decay must be in \[0, infinity\), got inf",
    ),
    (lambda: meta3(1e-3, eps=INF), r"eps must be in \[0, infinity\), got inf"),
    (lambda: axiom(clip_rms=INF), r"clip_rms must be in \(0, infinity\), got inf"),
    (lambda: average_iterates(INF), r"power must be in \[0, infinity\), got inf"),
    (lambda: limit_relative_step(INF), r"limit must be in \(0, infinity\), got inf"),
    (lambda: meta3(1e-3, law=Meta3(rate_gain=INF)), r"rate_gain must be in \[0, infinity\)"),
    (lambda: meta3(1e-3, law=Meta3(curvature_alarm=NAN)), r"curvature_alarm must be in \(0, inf"),
    (lambda: axiom(momentum_bits=7), "momentum_bits must be 32, 16, 8 or 4, got 7"),
    (lambda: TelemetryLog("x", every=0), "every must be a whole number >= 1, got 0"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_wrong_value(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert ";" in str(error.value), "the remedy follows"


def test_infinity_is_taken_where_it_says_something():
    Meta3(scale_bounds=(0.0, INF), surge_ratio=INF, curvature_alarm=INF)
    StabilityV2(alarm=INF)
    meta3(1e-3, bounds=(1e-7, INF))


def test_whole_numbers_of_numpy_are_whole_numbers():
    params = {"w": jnp.ones((64, 64))}
    plain = cosmic(1e-3, 40_000, state_bits=8, tiers={"['w']": 2})
    numpy = cosmic(
        1e-3, np.int64(40_000), state_bits=np.int32(8), tiers={"['w']": np.int64(2)},
        law=Meta3(meta_interval=np.int64(10), history=np.int32(14)),
    )  # fmt: skip
    assert repr(tier_plan(numpy.init(params))) == repr(tier_plan(plain.init(params)))
    axiom(b1=0.9, momentum_bits=np.int64(4), min_dim_size_to_factor=np.int64(32))
    quantize_state(optax.adam(1e-3), 8, block_size=np.int64(256))


@pytest.mark.parametrize("law", ["meta3", Meta3, None, object()])
def test_unknown_law(law):
    with pytest.raises(TypeError, match=r"law must be an instance with .* got .*; give Meta3\(\)"):
        stabilize(optax.sgd(0.1), law=law)


@pytest.mark.parametrize("value", [None, [0.1], "0.1", True])
def test_no_number_at_all(value):
    with pytest.raises(TypeError, match="eps must be a number, got"):
        meta3(1e-3, eps=value)


def test_momentum_of_integers():
    with pytest.raises(TypeError, match="mu_dtype must be a floating dtype, got"):
        meta_lion(1e-3, mu_dtype=int)


def test_inner_that_is_no_transformation():
    with pytest.raises(TypeError, match=r"inner must be a gradient transformation, got 0\.1"):
        stabilize(0.1)


def test_string_for_a_number():
    with pytest.raises(TypeError, match="learning_rate must be a number, got '1e-3'"):
        meta3("1e-3")


ACTUATORS = {
    "clip_by_predicted_norm": clip_by_predicted_norm(),
    "scale_by_controlled_adam": scale_by_controlled_adam(),
    "scale_by_controlled_lion": scale_by_controlled_lion(),
    "throttle_by_phase": throttle_by_phase(),
    "scale_by_meta_learning_rate": scale_by_meta_learning_rate(0.1),
}


@pytest.mark.parametrize("name", ACTUATORS)
def test_actuator_outside_stabilize_says_where_it_belongs(name):
    tx, params = optax.chain(ACTUATORS[name]), {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match=rf"{name}\(\) must run inside stabilize\(\).*write "):
        tx.update(params, tx.init(params), params)


def test_stabilize_inside_stabilize():
    tx = stabilize(optax.chain(optax.masked(meta3(0.1), True)))
    with pytest.raises(ValueError, match=r"must not stand inside another stabilize\(\)"):
        tx.init({"w": jnp.ones(2)})


def test_weight_decay_without_params():
    tx, params = meta3(0.1, weight_decay=0.1), {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="params"):
        tx.update(params, tx.init(params))


def test_params_may_be_left_out_without_weight_decay():
    tx, params = meta3(0.1, weight_decay=0.0), {"w": jnp.ones(2)}
    updates, _ = tx.update(params, tx.init(params))
    assert jnp.all(updates["w"] < 0)


def test_telemetry_of_a_state_without_a_controller():
    state = optax.adamw(0.1).init({"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"telemetry\(\) needs a state with a controller"):
        telemetry(state)


def test_traced_hyperparameters_pass():
    params = {"w": jnp.ones(2)}

    @jax.jit
    def one_step(rate, b1, b2, decay):
        tx = meta3(rate, b1=b1, b2=b2, weight_decay=decay)
        return tx.update(params, tx.init(params), params)[0]

    traced = one_step(0.1, 0.9, 0.999, 0.01)
    tx = meta3(0.1, weight_decay=0.01)
    want = tx.update(params, tx.init(params), params)[0]
    assert jnp.allclose(traced["w"], want["w"], rtol=1e-6)
