"""What optax's and Flax's wrappers do to the loss, the guard and the telemetry."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import cruxy_optax
from cruxy_control import Meta3
from cruxy_optax import meta3, meta_lion, stabilize, telemetry
from optimizers import assert_close, assert_same, gradients, train, tree

STEPS = 6


def run(tx, params=None, steps=STEPS, bad=()):
    """Parameters, state and telemetry after some steps, NaN where `bad` says."""
    grads, losses = gradients(steps)
    scale = jnp.ones(steps).at[jnp.array(bad, int)].set(jnp.nan)
    grads = jax.tree.map(lambda g: g * scale.reshape(-1, *[1] * (g.ndim - 1)), grads)
    return train(tx, tree() if params is None else params, grads, losses)


def test_chain_passes_the_loss_and_telemetry_finds_it():
    params, state = run(optax.chain(optax.identity(), meta3(0.01)))
    assert_close(params, run(meta3(0.01))[0])
    assert float(telemetry(state)["loss"]) == 1.0


def test_masked_outside_leaves_what_it_hides_unguarded():
    mask = {"w": True, "b": False, "s": True, "none": True}
    tx, params = optax.masked(meta3(0.01), mask), tree()
    bad = {**params, "b": params["b"] * jnp.nan}
    updates, state = tx.update(bad, tx.init(params), params, value=1.0)
    assert int(telemetry(state)["skipped_total"]) == 0
    assert np.isnan(updates["b"]).all()


def test_masked_inside_is_guarded():
    mask = {"w": True, "b": False, "s": True, "none": True}
    tx, params = stabilize(optax.masked(optax.sgd(0.1), mask)), tree()
    bad = {**params, "b": params["b"] * jnp.nan}
    updates, state = tx.update(bad, tx.init(params), params, value=1.0)
    assert int(telemetry(state)["skipped_total"]) == 1
    assert np.all(updates["b"] == 0)


def test_partition_around_gives_each_group_a_controller_by_path():
    labels = {"w": "a", "b": "b", "s": "b", "none": "b"}
    tx = optax.partition({"a": meta3(0.01), "b": meta_lion(0.001)}, labels)
    shown = telemetry(run(tx)[1])
    assert sorted(shown) == [".inner_states['a'].inner_state", ".inner_states['b'].inner_state"]
    assert all(float(group["loss"]) == 1.0 for group in shown.values())


def test_multi_steps_passes_the_last_micro_batch_loss_and_skips_bad_ones_if_asked():
    tx = optax.MultiSteps(meta3(0.01), 2, should_skip_update_fn=optax.skip_not_finite)
    _, state = run(tx, steps=6)
    assert int(telemetry(state)["step"]) == 3
    assert float(telemetry(state)["loss"]) == 1.0
    _, state = run(tx, steps=6, bad=[2])
    shown = telemetry(state)
    assert (int(shown["step"]), int(shown["skipped_total"])) == (2, 0)


def test_multi_steps_without_its_skip_keeps_a_nan_for_ever():
    """What the documentation warns of: the accumulator, not the controller, is poisoned."""
    _, state = run(optax.MultiSteps(meta3(0.01), 2), steps=6, bad=[0])
    assert int(telemetry(state)["skipped_total"]) == 3, "every step after it is lost"
    assert np.isnan(state.acc_grads["w"]).all()


def test_multi_steps_inside_a_chain_loses_the_loss():
    """Optax's wrapper says it takes no extra arguments: it has to be the outermost one."""
    _, state = run(optax.chain(optax.MultiSteps(meta3(0.01), 2), optax.identity()))
    assert np.isnan(telemetry(state)["loss"])


def test_inject_hyperparams_sets_the_rate_and_leaves_the_law_alone():
    factory = optax.inject_hyperparams(meta3, static_args=("mask",), hyperparam_dtype=jnp.float32)
    params = tree(jnp.bfloat16)
    tx = factory(learning_rate=0.01, weight_decay=0.01, law=Meta3(meta_interval=5))
    state = tx.init(params)
    assert state.hyperparams["b2"] == np.float32(0.999)
    assert state.hyperparams["b2"].dtype == jnp.float32
    step = jax.jit(tx.update)
    _, state = step(params, state, params, value=1.0)
    first = float(telemetry(state)["learning_rate"])
    state.hyperparams["learning_rate"] = jnp.float32(0.02)
    assert float(optax.tree.get(state, "learning_rate")) == pytest.approx(0.02)  # the one to set
    _, state = step(params, state, params, value=1.0)
    assert float(telemetry(state)["learning_rate"]) == pytest.approx(2 * first, rel=1e-5)
    assert step._cache_size() == 1


def test_inject_hyperparams_equals_the_constant():
    factory = optax.inject_hyperparams(meta3, static_args=("mask",), hyperparam_dtype=jnp.float32)
    tx = factory(learning_rate=0.01)
    assert_close(run(tx)[0], run(meta3(0.01))[0])


@pytest.mark.parametrize(
    ("factory", "static"),
    [
        (cruxy_optax.axiom, "min_dim_size_to_factor"),
        (partial(cruxy_optax.cosmic, state_budget="40KB"), "state_bits"),
        (cruxy_optax.scale_by_controlled_muon, "steps"),
        (cruxy_optax.orthogonalize_updates, "steps"),
    ],
)
def test_inject_hyperparams_names_what_has_to_be_static(factory, static):
    """A number that shapes the program cannot be an array, which the wrapper makes of it."""
    with pytest.raises(ValueError, match=f"{static} .* name it in static_args"):
        optax.inject_hyperparams(factory)().init(tree())


def test_apply_if_finite_hides_the_skip_counter():
    tx = optax.apply_if_finite(meta3(0.01), max_consecutive_errors=3)
    _, state = run(tx, bad=[2])
    assert int(telemetry(state)["skipped_total"]) == 0
    assert int(state.total_notfinite) == 1


def test_schedule_free_runs_and_moves_parameters_on_a_skipped_step():
    tx = optax.contrib.schedule_free(meta3(0.01, b1=0.0), learning_rate=0.01, b1=0.9)
    params, state = run(tx)
    shown = telemetry(state)
    assert float(shown["beta1"]) == 0.0
    assert int(shown["step"]) == STEPS
    bad = jax.tree.map(lambda p: p * jnp.nan, params)
    updates, state = tx.update(bad, state, params, value=1.0)
    assert int(telemetry(state)["skipped_total"]) == 1
    assert any(np.any(u != 0) for u in jax.tree.leaves(updates)), "it interpolates all the same"
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_train_state_without_a_loss():
    model = nn.Dense(3)
    x = jnp.ones((2, 4))
    state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), x),
        tx=optax.chain(meta3(0.01)),
    )

    @jax.jit
    def step(state):
        grads = jax.grad(lambda p: jnp.sum(state.apply_fn(p, x) ** 2))(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(3):
        state = step(state)
    shown = telemetry(state)
    assert int(shown["step"]) == 3
    assert np.isnan(shown["loss"])
    assert float(shown["curvature"]) == 0.0


def test_nnx_optimizer_with_the_loss():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, meta3(0.01), wrt=nnx.Param)
    x = jnp.ones((2, 4))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.sum(m(x) ** 2))(model)
        optimizer.update(model, grads, value=loss)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(3)]
    shown = telemetry(optimizer.opt_state)
    assert int(shown["step"]) == 3
    assert float(shown["loss"]) == pytest.approx(losses[-1])
    assert float(shown["learning_rate"]) == pytest.approx(0.0075, rel=0.1)


def test_tree_map_params_sees_the_moments_as_parameters():
    tx, params = meta3(0.01), tree()
    state = optax.tree_map_params(tx, lambda x: x + 1.0, tx.init(params))
    adam = state.inner_state[1]
    assert np.all(adam.mu["w"] == 1.0)
    assert np.all(adam.nu["b"] == 1.0)
    assert float(adam.mu_decay) == 1.0


def test_reduce_on_plateau_inside_the_chain_gets_the_loss():
    tx = stabilize(optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()))
    _, state = run(tx)
    assert float(optax.tree.get(state, "best_value")) == 1.0


def test_same_state_is_read_twice_the_same():
    _, state = run(meta3(0.01))
    assert_same(telemetry(state), telemetry(state))
