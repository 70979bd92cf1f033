"""One bad batch costs one step and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cruxy_optax import (
    meta3,
    meta_lion,
    scale_by_controlled_adam,
    scale_by_meta_learning_rate,
    stabilize,
    telemetry,
)
from optimizers import (
    OPTIMIZERS,
    assert_close,
    assert_same,
    at,
    different_optimizers,
    gradients,
    train,
    tree,
)

BAD = {
    "nan": lambda g: g.at[0, 0].set(jnp.nan),
    "inf": lambda g: g.at[1, 2].set(-jnp.inf),
    "finite 1e30": lambda g: g.at[0, 0].set(1e30),
}


def spoil(grads, how):
    """The gradients with one bad element in one leaf."""
    return {**grads, "w": BAD[how](grads["w"])}


def values(state):
    """What must not move on a skipped step: everything but counters, signals and controls."""
    return state.law_state, state.inner_state


@different_optimizers
@pytest.mark.parametrize("how", BAD)
def test_bad_step_changes_no_value_and_the_next_good_step_trains_on(name, how):
    tx, (grads, losses) = OPTIMIZERS[name](), gradients(8)
    step = jax.jit(tx.update)
    params, state = train(tx, tree(), grads, losses)
    updates, after = step(spoil(at(grads, 0), how), state, params, value=losses[0])
    assert all(np.all(u == 0) for u in jax.tree.leaves(updates))
    assert_same(optax.apply_updates(params, updates), params)
    kept = jax.tree.map(lambda new, old: new, values(after), values(state))
    _forget_last_used(name, kept, values(state))
    assert int(after.skipped_total) == int(after.skipped_in_a_row) == 1
    assert int(after.step) == int(state.step)

    resumed = step(at(grads, 1), after, params, value=losses[1])
    unbroken = step(at(grads, 1), state, params, value=losses[1])
    assert_same((resumed[0], values(resumed[1])), (unbroken[0], values(unbroken[1])))
    assert int(resumed[1].skipped_in_a_row) == 0


def _forget_last_used(name, got, want):
    """Equal but for the betas and rate of the step itself, which telemetry shows as 1 and 0."""

    def check(path, a, b):
        field = jax.tree_util.keystr(path).rsplit(".", 1)[-1]
        if field in ("beta1", "beta2"):
            assert float(a) == 1.0
        elif field == "applied_rate":
            assert float(a) == 0.0
        else:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=f"{name} {field}")

    jax.tree_util.tree_map_with_path(check, got, want)


@different_optimizers
def test_very_first_step_may_be_the_bad_one(name):
    tx, (grads, losses) = OPTIMIZERS[name](), gradients(8)
    params, state = tree(), OPTIMIZERS[name]().init(tree())
    for how in BAD:
        updates, state = tx.update(spoil(at(grads, 0), how), state, params, value=losses[0])
        params = optax.apply_updates(params, updates)
    got = train(tx, params, grads, losses, state)
    want = train(tx, tree(), grads, losses)
    assert_same((got[0], values(got[1])), (want[0], values(want[1])))


@different_optimizers
def test_a_hundred_bad_steps_running_leave_everything_as_it_was(name):
    tx, (grads, losses) = OPTIMIZERS[name](), gradients(8)
    start = train(tx, tree(), grads, losses)
    bad = jax.tree.map(lambda g: jnp.broadcast_to(g[0] * jnp.nan, (100, *g.shape[1:])), grads)
    params, state = train(tx, start[0], bad, jnp.full(100, jnp.nan), start[1])
    assert int(state.skipped_in_a_row) == int(state.skipped_total) == 100
    got = train(tx, params, grads, losses, state)
    want = train(tx, start[0], grads, losses, start[1])
    assert_same((got[0], values(got[1])), (want[0], values(want[1])))


@pytest.mark.parametrize("optimizer", [meta3, meta_lion])
def test_float16_overflow_of_the_square_is_clipped_not_skipped(optimizer):
    params = {"w": jnp.ones((8, 8), jnp.float16)}
    tx = optimizer(1e-3)
    state = tx.init(params)
    for size in (1.0, 6e4, 1.0):
        grads = {"w": jnp.full((8, 8), size, jnp.float16)}
        updates, state = jax.jit(tx.update)(grads, state, params, value=1.0)
        params = optax.apply_updates(params, updates)
    shown = telemetry(state)
    assert int(shown["skipped_total"]) == 0
    assert all(
        np.isfinite(np.asarray(x, np.float32)).all()
        for x in jax.tree.leaves((params, state.inner_state, state.law_state))
    )


def test_unguarded_peers_are_poisoned_by_what_is_skipped_here():
    """The test above can fail: a finite 1e30 passes optax's own guard and spoils Adam."""
    grads, _ = gradients(8)
    tx = optax.apply_if_finite(optax.adamw(0.01), max_consecutive_errors=10)
    params = tree()
    state = tx.init(params)
    for t, how in enumerate([None, "finite 1e30", None, None]):
        now = at(grads, t) if how is None else spoil(at(grads, t), how)
        _, state = tx.update(now, state, params)
    assert np.isinf(state.inner_state[0].nu["w"]).any()


def test_clean_gradients_are_never_skipped():
    rng = np.random.default_rng(0)
    tx = meta3(1e-3)
    params = {"w": jnp.ones(64)}
    grads = {"w": jnp.asarray(rng.standard_t(2, (3000, 64)), jnp.float32)}
    state, _ = jax.jit(
        lambda grads: jax.lax.scan(
            lambda state, g: (tx.update(g, state, params, value=1.0)[1], None),
            tx.init(params),
            grads,
        )
    )(grads)
    assert int(state.skipped_total) == 0
    assert int(state.step) == 3000


@pytest.mark.parametrize("optimizer", [meta3, meta_lion])
def test_gradient_times_1000_costs_no_more_than_one_clipped_step(optimizer):
    tx, (grads, losses) = optimizer(0.01), gradients(60)
    spiked = jax.tree.map(lambda g: g.at[30].multiply(1000.0), grads)
    got, state = train(tx, tree(), spiked, losses)
    want, _ = train(tx, tree(), grads, losses)
    # Each element moves at most about twice the rate a step: for the ten steps that beta1 = 0.87
    # remembers, the two runs differ by less than that.
    gap = max(float(jnp.max(jnp.abs(got[k] - want[k]))) for k in ("w", "b", "s"))
    assert gap < 2 * 0.01 * 10
    assert int(state.skipped_total) == 0


def test_guard_holds_under_vmap_for_each_seed_alone():
    tx, (grads, _) = meta3(0.01), gradients(4)
    one = at(grads, 0)
    both = jax.tree.map(lambda *x: jnp.stack(x), one, spoil(one, "nan"))
    params = jax.tree.map(lambda p: jnp.stack([p, p]), tree())
    state = jax.vmap(tx.init)(params)
    updates, state = jax.vmap(tx.update)(both, state, params)
    np.testing.assert_array_equal(state.skipped_total, [0, 1])
    alone, _ = tx.update(one, tx.init(tree()), tree())
    assert_close(jax.tree.map(lambda u: u[0], updates), alone)
    assert np.all(updates["w"][1] == 0)


def test_a_normaliser_before_the_moments_does_not_let_a_nan_through():
    unit = optax.stateless(lambda g, _: jax.tree.map(lambda x: x / jnp.linalg.norm(x), g))
    tx = stabilize(optax.chain(unit, scale_by_controlled_adam(), scale_by_meta_learning_rate(0.1)))
    params = {"w": jnp.ones(3)}
    _, state = tx.update({"w": jnp.full(3, jnp.nan)}, tx.init(params), params)
    updates, state = tx.update(params, state, params)
    assert np.isfinite(updates["w"]).all()


def test_states_of_any_kind_are_restored():
    """A random key, and a hyperparameter that the user set as a plain number."""
    params = {"w": jnp.ones(3)}
    noisy = stabilize(optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)))
    state = noisy.init(params)
    _, after = noisy.update({"w": jnp.full(3, jnp.nan)}, state, params)
    assert after.inner_state[0].rng_key == state.inner_state[0].rng_key
    injected = stabilize(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
    state = injected.init(params)
    state.inner_state.hyperparams["learning_rate"] = 0.5
    updates, _ = injected.update(params, state, params)
    np.testing.assert_allclose(updates["w"], -0.5)
