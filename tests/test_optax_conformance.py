"""Every optimizer through everything a gradient transformation must stand in JAX."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cruxy_control import Meta3, StabilityV1, StabilityV2
from cruxy_optax import meta3, meta_lion, stability_v1, stability_v2, telemetry
from jax_versions import enable_x64
from optimizers import (
    DIFFERENT,
    OPTIMIZERS,
    assert_close,
    assert_same,
    at,
    different_optimizers,
    every_optimizer,
    gradients,
    train,
    tree,
)
from relatives import crossed, relatives

STEPS = 12
GRADIENTS = list(zip(DIFFERENT, [jnp.bfloat16, jnp.int32] * 2, strict=True))


@different_optimizers
def test_jit_equals_no_jit(name):
    tx, (grads, losses) = OPTIMIZERS[name](), gradients(STEPS)
    assert_close(
        train(tx, tree(), grads, losses), train(tx, tree(), grads, losses, jit=False), ulps=256
    )


@different_optimizers
def test_scan_equals_the_loop(name):
    tx, (grads, losses) = OPTIMIZERS[name](), gradients(STEPS)

    @jax.jit
    def scanned(params, state):
        def body(carry, one):
            params, state = carry
            updates, state = tx.update(one[0], state, params, value=one[1])
            return (optax.apply_updates(params, updates), state), telemetry(state)["phase"]

        return jax.lax.scan(body, (params, state), (grads, losses))[0]

    assert_close(scanned(tree(), tx.init(tree())), train(tx, tree(), grads, losses), ulps=256)


@different_optimizers
def test_vmap_over_seeds_equals_each_seed(name):
    tx = OPTIMIZERS[name]()
    runs = [(tree(seed=s), gradients(STEPS, seed=10 * s)) for s in range(2)]
    params = jax.tree.map(lambda *x: jnp.stack(x), *(r[0] for r in runs))
    grads, losses = jax.tree.map(lambda *x: jnp.stack(x), *(r[1] for r in runs))

    @jax.vmap
    def step(params, state, grads, loss):
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    state = jax.vmap(tx.init)(params)
    for t in range(STEPS):
        now = jax.tree.map(lambda x, t=t: x[:, t], grads)
        params, state = jax.jit(step)(params, state, now, losses[:, t])
    for s, (start, (grads_s, losses_s)) in enumerate(runs):
        assert_close(
            jax.tree.map(lambda x, s=s: x[s], (params, state)),
            train(tx, start, grads_s, losses_s),
            ulps=256,
        )


@different_optimizers
def test_step_compiles_once_and_state_keeps_its_spec(name):
    tx, (grads, losses) = OPTIMIZERS[name](), gradients(STEPS)
    params = tree()
    state = tx.init(params)
    step = jax.jit(tx.update)
    spec = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for t in range(STEPS):
        bad = jnp.nan if t == 3 else 1.0
        scaled = jax.tree.map(lambda g, bad=bad: g * bad, at(grads, t))
        updates, state = step(scaled, state, params, value=losses[t])
        params = optax.apply_updates(params, updates)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == spec
    assert step._cache_size() == 1


@different_optimizers
def test_donated_buffers_give_the_same_result(name):
    tx, (grads, losses) = OPTIMIZERS[name](), gradients(STEPS)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads, loss):
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state, telemetry(state)

    params = tree()
    state = jax.jit(tx.init)(params)
    for t in range(STEPS):
        params, state, shown = step(params, state, at(grads, t), losses[t])
    want = train(tx, tree(), grads, losses)
    assert_close((params, state), want, ulps=256)
    assert float(shown["phase"]) == pytest.approx(float(telemetry(want[1])["phase"]))


@pytest.mark.parametrize(
    ("name", "dtype"),
    crossed(
        OPTIMIZERS,
        ["float32", "bfloat16", "float16", "mixed"],
        fast=[
            *((name, "mixed") for name in DIFFERENT),
            *(("meta3", "float16"), ("stability_v1", "bfloat16"), ("around_optax", "float32")),
        ],
    ),
)
def test_dtypes_of_updates_and_controllers(name, dtype):
    params = tree(jnp.float32 if dtype == "mixed" else dtype)
    if dtype == "mixed":
        params = {**params, "w": params["w"].astype(jnp.bfloat16), "h": jnp.ones(3, jnp.float16)}
    tx = OPTIMIZERS[name]()
    state = tx.init(params)
    spec = jax.tree.map(lambda x: x.dtype, state)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(params, state, params, value=jnp.float16(1.0))
        params = optax.apply_updates(params, updates)
        assert all(jax.tree.leaves(jax.tree.map(lambda u, p: u.dtype == p.dtype, updates, params)))
        assert all(np.isfinite(x.astype(np.float32)).all() for x in jax.tree.leaves(updates))
    assert jax.tree.map(lambda x: x.dtype, state) == spec
    scalars = jax.tree.leaves((state.law_state, state.signals, state.controls))
    assert {str(x.dtype) for x in scalars} <= {"float32", "int32", "bool"}


def test_moments_of_half_precision_parameters():
    params = {"h": jnp.ones(3, jnp.float16), "b": jnp.ones(3, jnp.bfloat16)}
    adam = meta3(1e-3).init(params).inner_state[1]
    assert (adam.mu["h"].dtype, adam.mu["b"].dtype) == (jnp.float32, jnp.bfloat16)
    assert (adam.nu["h"].dtype, adam.nu["b"].dtype) == (jnp.float32, jnp.float32)
    lion = meta_lion(1e-3, mu_dtype=jnp.bfloat16).init(params).inner_state[1]
    assert (lion.mu["h"].dtype, lion.mu["b"].dtype) == (jnp.bfloat16, jnp.bfloat16)


@pytest.mark.parametrize(
    ("name", "dtype"), crossed(OPTIMIZERS, [jnp.bfloat16, jnp.int32], fast=GRADIENTS)
)
def test_updates_have_the_dtype_of_the_parameters_not_of_the_gradients(name, dtype):
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    grads = jax.tree.map(lambda p: p.astype(dtype), params)
    tx = OPTIMIZERS[name]()
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, value=1.0)
    want, _ = tx.update(params, tx.init(params), params, value=1.0)
    assert_close(updates, want)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(
        lambda x: x.dtype, tx.init(params)
    )


def test_numpy_hyperparameters_do_not_widen_the_state():
    with enable_x64(True):
        params = {"w": jnp.ones(3, jnp.float32)}
        one = np.float64(1.0)
        tx = meta3(0.1 * one, b1=0.9 * one, b2=0.9 * one, eps=1e-8 * one, bounds=(0 * one, one))
        before = tx.init(params)
        _, after = tx.update(params, before, params, value=one)
        assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, before)


@different_optimizers
def test_float64_elsewhere_does_not_widen_the_state_of_float32_parameters(name):
    with enable_x64(True):
        tx, params = OPTIMIZERS[name](), tree()
        before = tx.init(params)
        updates, after = tx.update(params, before, params, value=jnp.float32(1.0))
        assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, before)
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}


def test_weight_decay_may_be_a_schedule_of_good_steps():
    params = {"w": jnp.ones(3)}
    zero = {"w": jnp.zeros(3)}
    tx = meta3(0.1, weight_decay=lambda count: 0.5 * count)
    state, decayed = tx.init(params), []
    for grads in (zero, {"w": zero["w"] * jnp.nan}, zero):
        updates, state = tx.update(grads, state, params)
        decayed.append(float(-updates["w"][0] / 0.1))
    assert decayed == [0.0, 0.0, pytest.approx(0.5, rel=1e-5)]


def test_bfloat16_momentum_changes_few_signs():
    """Its rounding, 2^-9 of the momentum, decides only where the two terms nearly cancel."""
    _, losses = gradients(STEPS)
    wide, narrow = meta_lion(0.01), meta_lion(0.01, mu_dtype=jnp.bfloat16)
    params = {"w": jnp.zeros((64, 64))}
    rng = np.random.default_rng(0)
    states, flipped = [wide.init(params), narrow.init(params)], []
    for t in range(STEPS):
        g = {"w": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)}
        one, states[0] = wide.update(g, states[0], params, value=losses[t])
        two, states[1] = narrow.update(g, states[1], params, value=losses[t])
        flipped.append(float(jnp.mean(jnp.sign(one["w"]) != jnp.sign(two["w"]))))
    assert max(flipped) < 0.01


def test_state_costs_what_the_docstring_says():
    params = {"w": jnp.zeros((64, 64)), "b": jnp.zeros(64)}
    count = sum(p.size for p in jax.tree.leaves(params))

    def extra(tx, each):
        total = sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))
        return total - each * count

    assert 0 < extra(meta3(1e-3), 8) < 1024
    assert 0 < extra(meta_lion(1e-3), 4) < 1024
    assert 0 < extra(meta_lion(1e-3, mu_dtype=jnp.bfloat16), 2) < 1024


@different_optimizers
def test_none_leaves_and_an_empty_tree_pass(name):
    tx = OPTIMIZERS[name]()
    params = {"w": jnp.ones((2, 2)), "gone": None}
    updates, state = jax.jit(tx.update)(params, tx.init(params), params, value=1.0)
    assert updates["gone"] is None
    updates, state = tx.update({}, tx.init({}), {}, value=1.0)
    assert updates == {}
    assert int(state.step) == 1


@every_optimizer
def test_masked_leaves_inside_the_chain(name):
    params = tree()
    mask = {"w": True, "b": False, "s": True, "none": False}
    tx = optax.chain(optax.masked(OPTIMIZERS[name](), mask), optax.scale(1.0))
    updates, _ = tx.update(params, tx.init(params), params, value=1.0)
    np.testing.assert_array_equal(updates["b"], params["b"])
    assert np.all(np.sign(updates["w"]) != np.sign(params["w"]))


@every_optimizer
def test_complex_parameters_are_refused(name):
    tx = OPTIMIZERS[name]()
    with pytest.raises(TypeError, match=r"must be real, got complex64; optimize the real and"):
        tx.init({"w": jnp.ones(2, jnp.complex64)})


@different_optimizers
def test_zero_gradients_and_a_frozen_model_make_no_nan(name):
    tx, params = OPTIMIZERS[name](), tree()
    zero = jax.tree.map(lambda p: jnp.zeros((30, *p.shape)), params)
    after, state = train(tx, params, zero, jnp.ones(30))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((after, state.law_state)))


@different_optimizers
def test_denormal_gradients_make_no_nan(name):
    tx, params = OPTIMIZERS[name](), tree()
    tiny = jax.tree.map(lambda p: jnp.full((30, *p.shape), 1e-41), params)
    after, state = train(tx, params, tiny, jnp.ones(30))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((after, state.law_state)))


@every_optimizer
def test_loss_may_be_left_out(name):
    tx, (grads, _) = OPTIMIZERS[name](), gradients(1)
    params = tree()
    _, state = tx.update(at(grads, 0), tx.init(params), params)
    assert np.isnan(telemetry(state)["loss"])
    assert float(state.controls.curvature) == 0.0


@pytest.mark.parametrize(
    "loss", relatives([jnp.nan, jnp.inf, -jnp.inf, -3.0, 0.0, 1e30, None], [jnp.nan, 1e30, None])
)
def test_any_loss_is_survived(loss):
    tx, (grads, losses) = meta3(0.01), gradients(STEPS)
    params, state = train(tx, tree(), grads, losses)
    updates, state = tx.update(at(grads, 0), state, params, value=loss)
    updates, state = tx.update(at(grads, 1), state, params, value=1.0)
    assert int(state.step) == STEPS + 2
    assert abs(float(telemetry(state)["curvature"])) < 0.2
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_loss_must_be_a_scalar():
    tx, params = meta3(0.01), tree()
    with pytest.raises(
        ValueError, match=r"value must be the loss, a real scalar, got shape \(2,\)"
    ):
        tx.update(params, tx.init(params), params, value=jnp.ones(2))


@different_optimizers
def test_it_finds_the_minimum_of_a_quadratic(name):
    target = tree(seed=5)
    tx = OPTIMIZERS[name](optax.exponential_decay(0.3, 50, 0.5))

    def loss_fn(params):
        gaps = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2), params, target)
        return sum(jax.tree.leaves(gaps))

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.zeros_like, target)
    state, start = tx.init(params), float(loss_fn(params))
    for _ in range(400):
        params, state = step(params, state)
    assert float(loss_fn(params)) < 0.01 * start


def test_float64_is_kept_where_jax_has_it():
    with enable_x64(True):
        params = {"w": jnp.ones(3, jnp.float64)}
        tx = meta3(1e-3)
        updates, state = tx.update(params, tx.init(params), params, value=1.0)
        assert updates["w"].dtype == jnp.float64
        assert state.inner_state[1].nu["w"].dtype == jnp.float64
        assert state.signals.grad_norm.dtype == jnp.float32


def test_schedule_counts_good_steps_only():
    tx, (grads, losses) = meta3(lambda count: 1.0 + count), gradients(4)
    params = tree()
    state = tx.init(params)
    seen = []
    for t, factor in enumerate([1.0, jnp.nan, 1.0, 1.0]):
        scaled = jax.tree.map(lambda g, f=factor: g * f, at(grads, t))
        _, state = tx.update(scaled, state, params, value=losses[t])
        values = telemetry(state)
        scale = values["phase_scale"] * values["meta_scale"]
        seen.append(round(float(values["learning_rate"] / scale), 4))
    assert seen == [1.0, 0.0, 2.0, 3.0]


def test_mask_limits_weight_decay():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = meta3(0.1, weight_decay=0.5, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    updates, _ = tx.update(zero, tx.init(params), params)
    assert np.all(updates["w"] < 0)
    assert np.all(updates["b"] == 0)


def test_centralize_takes_the_mean_over_input_axes_out_of_each_matrix():
    params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
    grads = {"w": jnp.array([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]), "b": jnp.array([1.0, 2.0])}
    tx = meta3(1.0, weight_decay=0.0, centralize=True, law=Meta3(clip_threshold=None))
    _, state = tx.update(grads, tx.init(params), params)
    mu = state.inner_state[2].mu
    weight = 1.0 - state.inner_state[2].beta1
    np.testing.assert_allclose(mu["w"], weight * np.array([[-1, -1], [0, 0], [1, 1]]), atol=1e-6)
    np.testing.assert_allclose(mu["b"], weight * grads["b"], rtol=1e-6)
    assert float(state.signals.grad_norm) == pytest.approx(96**0.5), "measured before"


@pytest.mark.parametrize(
    ("make", "law"), [(stability_v1, StabilityV1()), (stability_v2, StabilityV2())]
)
def test_earlier_optimizers_take_the_arguments_of_meta3_and_differ_in_the_law(make, law):
    own, wanted = (inspect.signature(f).parameters for f in (make, meta3))
    differing = {name: p.default for name, p in own.items() if p != wanted[name]}
    assert (list(own), differing) == (list(wanted), {"law": law})


def test_earlier_optimizers_hand_every_argument_on():
    arguments = {
        "learning_rate": 0.1,
        "b1": 0.8,
        "b2": 0.95,
        "eps": 1e-3,
        "mu_dtype": jnp.bfloat16,
        "weight_decay": 0.1,
        "mask": {"w": True, "b": False, "s": True, "none": True},
        "nesterov": False,
        "centralize": True,
        "law": Meta3(),
        "bounds": (1e-3, 1e-2),
    }
    names, (grads, losses) = list(arguments), gradients(STEPS)
    by_place, by_name = [arguments[n] for n in names[:7]], {n: arguments[n] for n in names[7:]}
    got = train(stability_v1(*by_place, **by_name), tree(), grads, losses)
    assert_same(got, train(meta3(**arguments), tree(), grads, losses))


@pytest.mark.parametrize("name", ["self_driving", "self_driving_lion", "tiger"])
def test_no_sum_of_products_is_cut_to_fewer_bits(name):
    """As on a GPU, which has products of float32 in TensorFloat-32 unless told not to."""
    tx, (grads, losses) = OPTIMIZERS[name](), gradients(1)
    update = lambda g, s, p: tx.update(g, s, p, value=losses[0])  # noqa: E731
    jaxpr = jax.make_jaxpr(update)(at(grads, 0), tx.init(tree()), tree())
    vectors = [e for e in equations(jaxpr.jaxpr) if not any(v.aval.ndim for v in e.outvars)]
    assert vectors
    for equation in vectors:
        assert equation.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


def equations(jaxpr):
    """Products that are summed, also inside other functions."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for part in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(part, "jaxpr") or hasattr(part, "eqns"):
                yield from equations(getattr(part, "jaxpr", part))


def test_same_run_twice_is_the_same_bits():
    tx, (grads, losses) = meta3(0.01), gradients(STEPS)
    assert_same(train(tx, tree(), grads, losses), train(tx, tree(), grads, losses))
