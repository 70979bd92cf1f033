"""Bad input is met at the door with the rule, the value and the remedy."""

import jax
import jax.numpy as jnp
import optax
import pytest

from cruxy_control import Meta3
from cruxy_optax import (
    TelemetryLog,
    clip_by_predicted_norm,
    meta3,
    meta_lion,
    scale_by_controlled_adam,
    scale_by_controlled_lion,
    scale_by_meta_learning_rate,
    stability_v1,
    stability_v2,
    stabilize,
    telemetry,
    throttle_by_phase,
    track_curvature,
    track_gamma_norm,
)

NAN = float("nan")
WRONG = [
    (lambda: meta3(-1e-3), r"learning_rate must be in \[0, infinity\], got -0.001; use about"),
    (lambda: meta3(NAN), r"learning_rate must be in \[0, infinity\], got nan"),
    (lambda: meta3(1e-3, b1=1.0), r"b1 must be in \[0, 1\), got 1.0"),
    (lambda: meta_lion(1e-3, b2=-0.1), r"b2 must be in \[0, 1\), got -0.1"),
    (lambda: meta3(1e-3, eps=-1.0), r"eps must be in \[0, infinity\], got -1.0"),
    (lambda: stability_v1(1e-3, weight_decay=-0.1), r"weight_decay must be in \[0, infinity\]"),
    (lambda: stability_v2(1e-3, bounds=(1.0, 0.1)), r"bounds must have lower <= upper"),
    (lambda: meta3(1e-3, law=Meta3(meta_interval=0)), "meta_interval must be a whole number"),
    (lambda: track_gamma_norm(gamma=0.9), r"gamma must be in \[1, infinity\], got 0.9"),
    (lambda: track_curvature(decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
    (lambda: TelemetryLog(), "needs a path or a writer, got neither"),
    (lambda: TelemetryLog("x", every=0), "every must be a whole number >= 1, got 0"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_wrong_value(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert ";" in str(error.value), "the remedy follows"


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
