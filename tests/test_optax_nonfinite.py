"""No NaN and no infinity where all is as it should be: in states, on the way, in derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cruxy_control import Meta3
from cruxy_optax import limit_relative_step, meta3, self_driving, self_driving_lion, telemetry
from optimizers import OPTIMIZERS, every_optimizer
from relatives import crossed, relatives


@pytest.fixture
def debug_nans():
    jax.config.update("jax_debug_nans", True)
    yield
    jax.config.update("jax_debug_nans", False)


def tensors():
    return {"w": jnp.linspace(-1.0, 2.0, 12).reshape(3, 4), "b": jnp.zeros(4)}


@every_optimizer
@pytest.mark.parametrize(("loss", "jitted"), crossed([None, 1.5], [False, True]))
def test_debugging_of_nans_stops_at_none_of_ours_and_states_are_finite(
    name, loss, jitted, debug_nans
):
    tx, params = optax.with_extra_args_support(OPTIMIZERS[name]()), tensors()
    update = jax.jit(tx.update) if jitted else tx.update
    state = tx.init(params)
    for _ in range(3):
        updates, state = update(params, state, params, value=loss)
        params = optax.apply_updates(params, updates)
    # What is not a float, as a coded array, has no such numbers.
    leaves = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_telemetry_still_shows_what_there_is_not_as_what_json_has_no_number_for():
    tx, params = meta3(1e-3, law=Meta3(clip_threshold=None)), tensors()
    _, state = tx.update(params, tx.init(params), params)
    assert np.isnan(telemetry(state)["loss"])
    assert np.isinf(telemetry(state)["clip_threshold"])
    _, state = tx.update(params, state, params, value=3.0)
    assert telemetry(state)["loss"] == 3.0


DIFFERENTIABLE = {
    "meta3": lambda: meta3(1e-2),
    "self_driving": lambda: self_driving(1e-2),
    "self_driving_lion": lambda: self_driving_lion(1e-2, weight_decay=0.1),
    "limited": lambda: optax.with_extra_args_support(
        optax.chain(optax.sgd(0.1), limit_relative_step(0.5))
    ),
}


@pytest.mark.parametrize("name", relatives(DIFFERENTIABLE, ["self_driving"]))
def test_derivative_through_the_steps_is_that_of_finite_differences(name):
    tx = DIFFERENTIABLE[name]()
    mask = {"w": jnp.ones((3, 4)).at[0].set(0.0), "b": jnp.array([1.0, 0.0, 1.0, 1.0])}

    def loss_fn(params):  # the first row and an element have gradients of 0, as behind a ReLU
        return sum(jnp.sum(mask[k] * (params[k] - 1.0) ** 2) for k in mask)

    @jax.jit
    def outer(start):
        params = {"w": tensors()["w"] * start, "b": tensors()["b"]}
        state = tx.init(params)
        for _ in range(3):
            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, state = tx.update(grads, state, params, value=loss)
            params = optax.apply_updates(params, updates)
        return jnp.sum(params["w"] ** 2) + jnp.sum(params["b"])

    step = 1e-3
    differences = float((outer(1.5 + step) - outer(1.5 - step)) / (2 * step))
    # Two units in the last place of a float32 near 60, over two steps.
    assert float(jax.grad(outer)(1.5)) == pytest.approx(differences, abs=2 * 2**-18 / step)


def test_derivative_through_a_step_of_zero_gradients_is_finite():
    def outer(start):
        params = {"w": start * jnp.ones(3)}
        tx = self_driving()
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update({"w": 0.0 * params["w"]}, state, params, value=start)
            params = optax.apply_updates(params, updates)
        return jnp.sum(params["w"])

    assert float(jax.grad(outer)(1.0)) == pytest.approx(3.0, rel=1e-4)  # less the weight decay
