"""Low-bit states through what optax and JAX do: the same bits, resumed, skipped, scanned."""

import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import usual
from cruxy_exact.codes import BlockCode
from cruxy_exact.random_bits import stream_key
from cruxy_optax import (
    clip_by_predicted_norm,
    meta3,
    meta_lion,
    quantize_state,
    scale_by_controlled_adam,
    scale_by_meta_learning_rate,
    stability_v2,
    stabilize,
    telemetry,
    throttle_by_phase,
)
from low_bit import coded, heavy_tailed, large_tree, low_bit
from optimizers import assert_same, at, train
from relatives import crossed, relatives

HALVES = slice(0, 3), slice(3, 6)


def stream(steps=6, seed=1):
    """Gradients like `large_tree`, one a step, and losses."""
    each = [large_tree(seed + t) for t in range(steps)]
    return jax.tree.map(lambda *x: jnp.stack(x), *each), jnp.linspace(2.0, 1.0, steps)


def half(stacked, losses, which):
    """One half of a stream."""
    return jax.tree.map(lambda g: g[HALVES[which]], stacked), losses[HALVES[which]]


OPTIMIZERS = {
    "meta3_8": lambda rate=0.01: meta3(rate, state_bits=8),
    "meta3_4": lambda rate=0.01: meta3(rate, state_bits=4),
    "meta_lion_4": lambda rate=0.01: meta_lion(rate, state_bits=4),
    "around_meta3": lambda rate=0.01: quantize_state(meta3(rate), 8),
    "around_a_chain": lambda rate=0.01: stabilize(
        quantize_state(
            optax.chain(
                clip_by_predicted_norm(),
                scale_by_controlled_adam(),
                throttle_by_phase(),
                scale_by_meta_learning_rate(rate),
            ),
            4,
        )
    ),
    "optax_inside": lambda rate=0.01: stabilize(
        optax.chain(
            clip_by_predicted_norm(), quantize_state(optax.scale_by_adam()), optax.scale(-rate)
        )
    ),
}
some_optimizers = pytest.mark.parametrize(
    "name", relatives(["meta3_8", "meta_lion_4", "around_a_chain"], ["meta3_8", "around_a_chain"])
)
two_optimizers = pytest.mark.parametrize(
    "name", relatives(OPTIMIZERS, ["meta_lion_4", "optax_inside"])
)


@two_optimizers
def test_state_keeps_its_spec_and_the_step_compiles_once(name):
    tx, (grads, losses) = OPTIMIZERS[name](), stream()
    params = large_tree()
    state = tx.init(params)
    step, spec = jax.jit(tx.update), jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert len(coded(state)) in (2, 4)
    for t in range(len(losses)):
        factor = jnp.nan if t == 2 else 1.0
        g = jax.tree.map(lambda x, f=factor: x * f, at(grads, t))
        updates, state = step(g, state, params, value=losses[t])
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == spec
        assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    assert step._cache_size() == 1
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


# A step of the code is at most 2^-2 of a value, in 4 bits, and moments are averages of ten of them.
# The update of Adam is within a few such steps of the float32 one; the mean over a leaf far nearer.
def assert_near(got, want, bits):
    for k in want:
        a, b = np.asarray(got[k], np.float64), np.asarray(want[k], np.float64)
        scale = np.abs(b).mean()
        assert np.abs(a - b).mean() <= scale * {8: 0.05, 4: 0.6}[bits], k
        assert abs((a - b).mean()) <= scale * {8: 0.05, 4: 0.6}[bits] / 2, k


@pytest.mark.parametrize(("make", "bits"), crossed([meta3, stability_v2], [8, 4]))
def test_it_stays_near_the_float32_state(make, bits):
    grads, losses = stream(20)
    wide, narrow = make(0.01, weight_decay=0.0), make(0.01, weight_decay=0.0, state_bits=bits)
    want = train(wide, large_tree(), grads, losses)[0]
    got = train(narrow, large_tree(), grads, losses)[0]
    moved = lambda p: jax.tree.map(lambda a, b: a - b, p, large_tree())  # noqa: E731
    assert_near(moved(got), moved(want), bits)
    np.testing.assert_array_equal(got["s"], want["s"], "what is not coded is not changed")


@two_optimizers
def test_scan_takes_the_same_kind_of_steps_as_the_loop(name):
    tx, (grads, losses) = OPTIMIZERS[name](), stream()

    @jax.jit
    def scanned(params, state):
        def body(carry, one):
            params, state = carry
            updates, state = tx.update(one[0], state, params, value=one[1])
            return (optax.apply_updates(params, updates), state), telemetry(state)["phase"]

        return jax.lax.scan(body, (params, state), (grads, losses))[0]

    got, want = scanned(large_tree(), tx.init(large_tree())), train(tx, large_tree(), grads, losses)
    # Compiled another way, an element may come out an ulp apart and so, now and then, on the other
    # side of a threshold: in fewer than one code of a hundred.
    for path, leaf in coded(want[1]).items():
        other = coded(got[1])[path]
        assert np.mean(np.asarray(leaf.codes) != np.asarray(other.codes)) < 0.01, path
    assert int(telemetry(got[1])["step"]) == len(losses)


@some_optimizers
def test_vmap_over_seeds_equals_each_seed(name):
    tx = OPTIMIZERS[name]()
    starts = [large_tree(seed=s) for s in range(2)]
    runs = [stream(3, seed=10 * s) for s in range(2)]
    params = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    grads = jax.tree.map(lambda *x: jnp.stack(x), *(g for g, _ in runs))
    state = jax.vmap(tx.init)(params)
    step = jax.jit(jax.vmap(lambda g, s, p, v: tx.update(g, s, p, value=v)))
    for t in range(3):
        now = jax.tree.map(lambda x, t=t: x[:, t], grads)
        updates, state = step(now, state, params, jnp.full(2, 1.0))
        params = optax.apply_updates(params, updates)
    for s in range(2):
        alone = train(tx, starts[s], runs[s][0], jnp.full(3, 1.0))
        mine = jax.tree.map(lambda x, s=s: x[s], state)
        for path, leaf in coded(alone[1]).items():
            other = coded(mine)[path]
            assert np.mean(np.asarray(leaf.codes) != np.asarray(other.codes)) < 0.01, path


@two_optimizers
def test_donated_buffers_give_the_same_result(name):
    tx, (grads, losses) = OPTIMIZERS[name](), stream(4)

    def step(params, state, g, loss):
        updates, state = tx.update(g, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    def steps(step):
        params = large_tree()
        state = jax.jit(tx.init)(params)
        for t in range(len(losses)):
            params, state = step(params, state, at(grads, t), losses[t])
        return params, state

    assert_same(steps(usual.jit(step, donate_argnums=(0, 1))), steps(usual.jit(step)))


@some_optimizers
def test_same_run_twice_is_the_same_bits(name):
    tx, (grads, losses) = OPTIMIZERS[name](), stream(3)
    assert_same(train(tx, large_tree(), grads, losses), train(tx, large_tree(), grads, losses))


def test_another_seed_rounds_in_another_way():
    grads, losses = stream(3)
    states = [
        train(quantize_state(optax.lion(0.01), seed=s), large_tree(), grads, losses)[1]
        for s in (0, 1)
    ]
    a, b = (state.inner_state[0].mu["w"].codes for state in states)
    assert 0.1 < np.mean(np.asarray(a) != np.asarray(b)) < 0.9


@two_optimizers
def test_orbax_resume_is_bit_identical(name, tmp_path):
    tx, (grads, losses) = OPTIMIZERS[name](), stream()
    first, second = half(grads, losses, 0), half(grads, losses, 1)
    params, state = train(tx, large_tree(), *first)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        blank = {"params": large_tree(), "state": tx.init(large_tree())}
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, blank)
        loaded = checkpointer.restore(tmp_path / "step", template)
    assert_same(loaded, {"params": params, "state": state})
    got = train(tx, loaded["params"], *second, loaded["state"])
    assert_same(got, train(tx, params, *second, state))


@some_optimizers
def test_pickled_state_resumes_bit_identical(name):
    tx, (grads, losses) = OPTIMIZERS[name](), stream()
    first, second = half(grads, losses, 0), half(grads, losses, 1)
    params, state = train(tx, large_tree(), *first)
    loaded = jax.tree.map(jnp.asarray, pickle.loads(pickle.dumps(jax.device_get((params, state)))))
    assert_same(train(tx, loaded[0], *second, loaded[1]), train(tx, params, *second, state))


def untouched(state):
    """All but the counters, signals and controls of the controller, which show the last step."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    shown = ("signals", "controls", "skipped", "beta1", "beta2", "applied_rate")
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in flat
        if not any(word in jax.tree_util.keystr(path) for word in shown)
    }


@pytest.mark.parametrize(("name", "bad"), crossed(OPTIMIZERS, [np.nan, 1e30]))
def test_skipped_step_keeps_every_code_and_the_next_one_goes_on(name, bad):
    tx, (grads, losses) = OPTIMIZERS[name](), stream(4)
    params, state = train(tx, large_tree(), grads, losses)
    step = jax.jit(tx.update)
    g = at(grads, 0)
    spoilt = {**g, "w": g["w"].at[3, 5].set(bad)}
    updates, after = step(spoilt, state, params, value=1.0)
    assert int(telemetry(after)["skipped_total"]) == 1
    assert all(np.all(np.asarray(u) == 0) for u in jax.tree.leaves(updates))
    assert_same(untouched(after), untouched(state))
    resumed, unbroken = (step(g, s, params, value=1.0) for s in (after, state))
    assert_same(resumed[0], unbroken[0])
    assert_same(untouched(resumed[1]), untouched(unbroken[1]))


def test_coding_again_is_not_exact_so_the_test_above_can_fail():
    x = jnp.asarray(heavy_tailed((64, 64), True))
    leaf = low_bit(x, BlockCode(4, True))
    keys = [stream_key(jnp.int32(t), 0, 0, xp=jnp) for t in range(2)]
    again = leaf.encode(leaf.encode(x, keys[0]).decode() * 1.0001, keys[1])
    assert np.any(np.asarray(again.codes) != np.asarray(leaf.encode(x, keys[0]).codes))


def test_nan_reaches_the_parameters_where_nothing_guards():
    tx = quantize_state(optax.adam(1e-3))
    params = {"w": jnp.ones((64, 64))}
    state = tx.init(params)
    bad = {"w": jnp.ones((64, 64)).at[0, 0].set(jnp.nan)}
    updates, state = tx.update(bad, state, params)
    updates, state = tx.update(params, state, params)
    assert np.isnan(np.asarray(updates["w"][:8, :32])).all(), "its block"
    assert np.isfinite(np.asarray(updates["w"][8:])).all()


def test_multi_steps_masked_and_inject_hyperparams_around_it():
    params, (grads, losses) = large_tree(), stream(4)
    tx = optax.MultiSteps(meta3(0.01, state_bits=8), 2)
    _, state = train(tx, params, grads, losses)
    assert int(telemetry(state)["step"]) == 2
    mask = {"w": True, "long": False, "b": True, "s": True}
    tx = optax.masked(meta3(0.01, state_bits=8), mask)
    _, state = train(tx, params, grads, losses)
    assert {p.rsplit("['")[-1] for p in coded(state)} == {"w']"}
    tx = optax.inject_hyperparams(
        meta3, static_args=("mask", "state_bits"), hyperparam_dtype=jnp.float32
    )(learning_rate=0.01, state_bits=4)
    _, state = train(tx, params, grads, losses)
    assert int(telemetry(state)["step"]) == 4
    assert len(coded(state)) == 4


def test_telemetry_of_a_low_bit_optimizer_is_that_of_the_float32_one():
    grads, losses = stream(5)
    wide = telemetry(train(meta3(0.01), large_tree(), grads, losses)[1])
    for tx in (meta3(0.01, state_bits=8), quantize_state(meta3(0.01), 4)):
        shown = telemetry(train(tx, large_tree(), grads, losses)[1])
        assert shown.keys() == wide.keys()
        for key in ("learning_rate", "phase", "grad_norm", "beta1"):
            np.testing.assert_allclose(shown[key], wide[key], rtol=1e-5)


def test_what_is_smaller_than_a_step_counts_on_average():
    """A gradient of 1e-3 beside one of 1, in momentum of 4 bits: the mean of 4096 elements."""
    g = {"w": jnp.full((64, 64), 1e-3).at[::8, ::32].set(1.0)}
    rest = np.asarray(g["w"]) < 1.0

    def momentum(stochastic):
        tx = quantize_state(optax.trace(0.9), 4, stochastic=stochastic)
        step, state = jax.jit(tx.update), tx.init(g)
        for _ in range(100):
            _, state = step(g, state)
        return np.asarray(state.inner_state.trace["w"].decode())[rest]

    # Each of the 4080 has the mean 1e-2 and spreads by the root of it times the step, 1, times 2.3.
    assert abs(momentum(True).mean() - 1e-2) < 6 * 2.3 * 0.1 / math.sqrt(4080)
    assert np.all(momentum(False) == 0.0)
