"""Soft signs, trust ratios, adaptive clips and slices: in chains, on shards, on bad gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cruxy_control import Meta3
from cruxy_control.slices import blocks, per_group, per_head
from cruxy_optax import (
    axiom,
    balance_slices,
    blend_sign,
    clip_by_parameter_norm,
    clip_by_predicted_norm,
    clip_by_rms,
    meta_lion,
    scale_by_controlled_momentum,
    scale_by_meta_learning_rate,
    scale_by_slices,
    scale_by_trust_ratio_ema,
    soften_sign,
    stabilize,
    telemetry,
    throttle_by_phase,
)
from cruxy_optax._actuators.factored import scale_by_factored_rms
from jax_versions import set_mesh
from optimizers import assert_close, assert_same, at, gradients, train, tree
from relatives import relatives

QKV = {"w": blocks(4, 2, 2, axis=1)}
"""Of `tree()["w"]`, 4 by 8."""

PARTS = {
    "soften": lambda: soften_sign(0.5),
    "blend": lambda: blend_sign(0.3),
    "schedule": lambda: blend_sign(optax.linear_schedule(0.0, 0.6, 10)),
    "trust": lambda: scale_by_trust_ratio_ema(decay=0.9),
    "rows": lambda: scale_by_trust_ratio_ema(decay=0.9, per="row"),
    "sliced": lambda: scale_by_trust_ratio_ema(decay=0.9, per="slice", slices=QKV),
    "momentum": lambda: scale_by_trust_ratio_ema(space="momentum", direction=blend_sign()),
    "agc": lambda: clip_by_parameter_norm(0.1, per="row"),
    "rms": lambda: clip_by_rms(0.5, per="block"),
    "slices": lambda: scale_by_slices(QKV, {"q": 0.9, "k": 0.8, "v": 1.1}),
    "balance": lambda: balance_slices(QKV, every=2),
}
LIKE_OTHERS = {"soften", "trust", "sliced", "momentum", "agc", "rms", "slices"}
"""They have a near relative among the parts."""
every_part = pytest.mark.parametrize("name", relatives(PARTS, PARTS.keys() - LIKE_OTHERS))
different_parts = pytest.mark.parametrize("name", relatives(PARTS, ["blend", "rows", "balance"]))


META3 = Meta3()
PASSIVE = Meta3(
    phase_strength=0.0,
    rate_gain=0.0,
    beta1_gain=0.0,
    beta2_gain=0.0,
    beta2_phase_strength=0.0,
    clip_threshold=None,
)


def chained(*parts, law=META3):
    return stabilize(
        optax.chain(
            clip_by_predicted_norm(),
            scale_by_controlled_momentum(),
            *parts,
            throttle_by_phase(),
            scale_by_meta_learning_rate(0.01),
        ),
        law=law,
    )


def test_temperature_zero_is_meta_lion_bit_for_bit():
    grads, losses = gradients(50)
    got = train(chained(soften_sign(0.0)), tree(), grads, losses)
    want = train(meta_lion(0.01, weight_decay=0.0), tree(), grads, losses)
    assert_same(got[0], want[0])
    assert_same(got[1].inner_state[1], want[1].inner_state[1])


@pytest.mark.parametrize("direction", [soften_sign(0.7), blend_sign(0.3, 0.7)])
def test_direction_is_that_of_gradients_a_thousand_times_as_large(direction):
    tx = chained(direction, law=PASSIVE)
    grads, losses = gradients(20)
    large = jax.tree.map(lambda g: 1000.0 * g, grads)
    got, want = (train(tx, tree(), g, losses)[0] for g in (large, grads))
    for a, b, start in zip(*map(jax.tree.leaves, (got, want, tree())), strict=True):
        np.testing.assert_allclose(a - start, b - start, rtol=1e-5, atol=1e-6)


@every_part
def test_step_compiles_once_and_a_bad_gradient_moves_nothing(name):
    tx, (grads, losses) = chained(PARTS[name]()), gradients(6)
    params, step = tree(), jax.jit(tx.update)
    state = tx.init(params)
    for t in range(6):
        now = at(grads, t)
        if t == 3:
            now["w"] = now["w"].at[1, 2].set(jnp.nan)
        updates, after = step(now, state, params, value=losses[t])
        if t == 3:
            assert_same(optax.apply_updates(params, updates), params)
            assert_same(after.inner_state[2], state.inner_state[2])
        params, state = optax.apply_updates(params, updates), after
    assert step._cache_size() == 1
    assert int(telemetry(state)["skipped_total"]) == 1
    assert all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(params))


@every_part
def test_run_goes_on_from_a_checkpoint_bit_for_bit(name):
    tx, (grads, losses) = chained(PARTS[name]()), gradients(6)
    first, last = (jax.tree.map(lambda g, k=k: g[k], grads) for k in (slice(3), slice(3, 6)))
    params, state = train(tx, tree(), first, losses[:3])
    saved = [np.asarray(leaf) for leaf in jax.tree.leaves((params, state))]
    structure = jax.tree.structure((tree(), tx.init(tree())))
    params, state = structure.unflatten(map(jnp.asarray, saved))
    assert_same(train(tx, params, last, losses[3:], state), train(tx, tree(), grads, losses))


@different_parts
@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
def test_sharded_equals_whole(name, kind):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    if kind is AxisType.Explicit and name == "rms":
        pytest.skip("JAX cuts no sharded axis of an explicit mesh into blocks")
    tx, (grads, losses) = chained(PARTS[name]()), gradients(4)
    grads, params = ({k: x[k] for k in ("w", "b")} for x in (grads, tree()))
    want = train(tx, params, grads, losses)
    with set_mesh(mesh):
        split = {"w": P("data", None), "b": P("data")}
        put = lambda x, lead=(): {  # noqa: E731
            k: jax.device_put(x[k], NamedSharding(mesh, P(*lead, *split[k]))) for k in split
        }
        got = train(tx, put(params), put(grads, (None,)), losses)
    assert_close(jax.device_get(got), jax.device_get(want), ulps=256)


SIZES = {
    "soften": lambda **axes: soften_sign(0.5, **axes),
    "blend": lambda **axes: blend_sign(0.3, **axes),
    "trust": lambda **axes: scale_by_trust_ratio_ema(decay=0.9, **axes),
    "sliced": lambda **axes: scale_by_trust_ratio_ema(per="slice", slices=QKV, **axes),
    "agc": lambda **axes: clip_by_parameter_norm(0.1, eps=5.0, **axes),
    "rms": lambda **axes: clip_by_rms(0.5, **axes),
    "balance": lambda **axes: balance_slices(QKV, every=1, **axes),
}


@pytest.mark.parametrize("name", SIZES)
def test_shard_map_over_the_parameters(name):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    alone, tx = SIZES[name](), SIZES[name](axis_names="data")
    params, grads = ({k: tree(seed=s)[k] for k in ("w", "b")} for s in (0, 1))
    specs = {"w": P("data"), "b": P()}

    def step(g, p):
        return tx.update(g, tx.init(p), p)[0]

    got = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(specs, specs), out_specs=specs))(
        grads, params
    )
    assert_close(got, alone.update(grads, alone.init(params), params)[0])


def test_schedule_of_the_weight_advances_on_good_steps_alone():
    seen = []
    tx = chained(blend_sign(lambda count: seen.append(count) or 0.2))
    params = tree()
    state = tx.init(params)
    for factor in (1.0, jnp.nan, 1.0):
        bad = jax.tree.map(lambda p, factor=factor: p * factor, params)
        _, state = tx.update(bad, state, params)
    assert [int(count) for count in seen] == [0, 1, 1]
    assert int(state.inner_state[2].count) == 2


def test_controls_take_the_sign_out_of_a_blend():
    tx, c = blend_sign(0.25, 0.0), jnp.array([3.0, -1.0, 1.0, 1.0])
    controls = stabilize(tx).init(c).controls._replace(sign_weight=jnp.float32(0.0))
    got = tx.update(c, tx.init(c), c, controls=controls)[0]
    np.testing.assert_allclose(got, c / np.sqrt(3.0), rtol=1e-6)


def test_trust_ratio_makes_a_step_a_share_of_its_tensor():
    params = {"w": jnp.full((3, 4), 2.0), "zero": jnp.zeros(5), "still": jnp.ones(2)}
    grads = {"w": jnp.full((3, 4), 0.5), "zero": jnp.ones(5), "still": jnp.zeros(2)}
    tx = scale_by_trust_ratio_ema(cap=10.0, floor=1e-2)
    got = tx.update(grads, tx.init(params), params)[0]
    want = {"w": jnp.full((3, 4), 2.0), "zero": jnp.full(5, 1e-2), "still": jnp.zeros(2)}
    assert_close(got, want)
    capped = tx.update(jax.tree.map(lambda g: g / 100, grads), tx.init(params), params)[0]
    assert_close(capped["w"], jnp.full((3, 4), 0.05))


def test_average_of_trust_ratios_is_bias_corrected():
    tx, params = scale_by_trust_ratio_ema(decay=0.9), jnp.full(4, 2.0)
    state, seen = tx.init(params), []
    for size in (1.0, 4.0):
        updates, state = tx.update(jnp.full(4, size), state, params)
        seen.append(float(updates[0]) / size)
    assert seen[0] == pytest.approx(2.0, rel=1e-6)
    logs = (0.9 * np.log(2.0) + np.log(0.5)) / 1.9
    assert seen[1] == pytest.approx(np.exp(logs), rel=1e-5)


def test_trust_of_rows_is_that_of_tensors_of_one_row():
    params, grads = tree(seed=3)["w"], tree(seed=4)["w"]
    rows = scale_by_trust_ratio_ema(decay=0.9, per="row")
    alone = scale_by_trust_ratio_ema(decay=0.9)
    got, _ = rows.update(grads, rows.init(params), params)
    apart, lines = list(params), list(grads)
    assert_close(got, jnp.stack(alone.update(lines, alone.init(apart), apart)[0]))


LAYOUTS = {
    "blocks": (blocks(6, 3, 3), (12, 5)),
    "columns": (blocks(4, 2, 2, axis=1), (3, 8)),
    "heads": (per_head(2, 2), (12, 5)),
    "groups": (per_group(2, 2, 2), (16, 3)),
    "linen": (blocks(1, 1, 1, axis=1), (6, 3, 2, 4)),
    "no queries": (blocks(0, 2, 2), (4, 3)),
}


def split(x, slices):
    """The slices of a tensor as tensors of their own."""
    cut = functools.partial(jax.lax.slice_in_dim, x, axis=slices.axis)
    return {
        name: jnp.concatenate([cut(*pair) for pair in ranges], axis=slices.axis)
        for name, ranges in slices.parts()
        if ranges
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trust_of_slices_is_that_of_split_tensors(layout):
    slices, shape = LAYOUTS[layout]
    rng = np.random.default_rng(5)
    params, grads = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    fused = scale_by_trust_ratio_ema(decay=0.9, per="slice", slices={"attn.*": slices})
    alone = scale_by_trust_ratio_ema(decay=0.9)
    whole, apart = {"attn": {"qkv": params}}, split(params, slices)
    state, states = fused.init(whole), alone.init(apart)
    for scale in (1.0, 3.0):
        got, state = fused.update({"attn": {"qkv": scale * grads}}, state, whole)
        want, states = alone.update(split(scale * grads, slices), states, apart)
    assert_close(split(got["attn"]["qkv"], slices), want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_have_rates_of_their_own(layout):
    slices, shape = LAYOUTS[layout]
    x = {"a": jnp.ones(shape), "other": jnp.ones(3)}
    rates = {"q": 0.9, "v": 1.1}
    tx = scale_by_slices({"a": slices}, rates)
    got, _ = tx.update(x, tx.init(x))
    for name, part in split(got["a"], slices).items():
        np.testing.assert_array_equal(part, np.float32(rates.get(name, 1.0)))
    assert_same(got["other"], x["other"])


def test_slices_are_balanced_every_so_many_steps_and_stay_within_bounds():
    tx, params = balance_slices({"a": blocks(2, 2, 2)}, every=3), {"a": jnp.ones(6)}
    steps, state, seen = {"a": jnp.array([1.0, 1, 1.2, 1.2, 0.1, 0.1])}, tx.init(params), []
    for _ in range(300):
        updates, state = jax.jit(tx.update)(steps, state, params)
        seen.append(np.asarray(state.multipliers["a"]))
    np.testing.assert_array_equal(seen[1], np.ones(3))
    assert seen[2][1] < 1.0 < seen[2][2]
    assert seen[2][2] == pytest.approx(1.1)
    np.testing.assert_allclose(seen[-1][2], 1.3, rtol=1e-6)
    assert updates["a"][2] == pytest.approx(1.2 * seen[-1][1], rel=1e-6)
    np.testing.assert_allclose(seen[-1][:2] * [1.0, 1.2], 1.0, rtol=2e-2)
    assert float(state.slice_dispersion) > 0.0


def test_telemetry_shows_the_dispersion_of_slices():
    state = train(chained(balance_slices(QKV, every=1)), tree(), *gradients(1))[1]
    assert float(telemetry(state)["slice_dispersion"]) > 0.0


@pytest.mark.parametrize("elements", [1, 255, 256, 257, 700])
def test_blocks_are_of_256_elements_along_the_last_axis(elements):
    u = np.random.default_rng(6).normal(size=(3, elements)).astype(np.float32)
    tx = clip_by_rms(0.7, per="block")
    got = tx.update(jnp.asarray(u), tx.init(u))[0]
    for start in range(0, elements, 256):
        block = u[:, start : start + 256]
        rms = np.sqrt(np.mean(block**2, axis=1, keepdims=True))
        want = block * np.minimum(1.0, 0.7 / rms)
        np.testing.assert_allclose(got[:, start : start + 256], want, rtol=1e-5)


@pytest.mark.parametrize("per", ["tensor", "row"])
def test_gradient_is_clipped_to_a_share_of_its_parameter(per):
    p, g = (np.asarray(tree(seed=s)["w"]) for s in (0, 1))
    axes = {"tensor": None, "row": 1}[per]
    norms = [np.linalg.norm(x, axis=axes, keepdims=axes is not None) for x in (p, g)]
    tx = clip_by_parameter_norm(0.1, eps=2.0, per=per)
    got = tx.update(jnp.asarray(g), tx.init(p), jnp.asarray(p))[0]
    want = g * np.minimum(1.0, 0.1 * np.maximum(norms[0], 2.0) / norms[1])
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("part", [clip_by_rms(1.0, per="row"), clip_by_parameter_norm(per="row")])
def test_rows_without_elements_stay_as_they_are(part):
    empty = jnp.ones((4, 0))
    assert part.update(empty, part.init(empty), empty)[0].shape == (4, 0)


def test_slices_without_elements_have_a_dispersion_of_zero():
    tx, empty = balance_slices(QKV, every=1), {"w": jnp.ones((0, 8))}
    assert tx.update(empty, tx.init(empty), empty)[1].slice_dispersion == 0.0


@pytest.mark.parametrize("space", ["update", "momentum"])
def test_space_says_where_a_step_is_measured(space):
    inner = {"direction": soften_sign(0.0)} if space == "momentum" else {}
    before = [] if inner else [soften_sign(0.0)]
    tx = optax.chain(*before, scale_by_trust_ratio_ema(space=space, **inner))
    params, momentum = jnp.full(4, 3.0), jnp.full(4, 0.5)
    got = tx.update(momentum, tx.init(params), params)[0]
    np.testing.assert_allclose(got, {"update": 3.0, "momentum": 6.0}[space], rtol=1e-6)


@every_part
def test_half_precision_keeps_its_dtype_and_zeros_stay_finite(name):
    tx, params = chained(PARTS[name]()), tree(jnp.bfloat16)
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(grads, tx.init(params), params)
    assert_same(updates, grads)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.inner_state))


@different_parts
def test_derivative_through_a_step_is_finite_at_zero(name):
    tx = PARTS[name]()
    params = {k: jnp.zeros_like(v) for k, v in tree().items()}

    def moved(grads):
        updates = tx.update(grads, tx.init(params), params)[0]
        return sum(jnp.sum(u) for u in jax.tree.leaves(updates))

    slopes = jax.grad(moved)(params)
    assert all(bool(jnp.isfinite(slope).all()) for slope in jax.tree.leaves(slopes))


def test_parts_see_only_what_partition_gives_them():
    def tx():
        return optax.partition(
            {"a": scale_by_slices(QKV, {"q": 0.5}), "b": scale_by_slices(QKV, {"q": 0.5})},
            {"w": "a", "b": "b", "s": "b", "none": "b"},
        )

    got = tx().update(tree(), tx().init(tree()), tree())[0]
    assert_same(got["w"][:, 4:], tree()["w"][:, 4:])
    assert_same(got["w"][:, :4], tree()["w"][:, :4] * 0.5)


POWERS = functools.partial(axiom, 1e-2, weight_decay=0.0, clip_rms=None, min_dim_size_to_factor=4)


@pytest.mark.parametrize("power", [0.0, 0.25, 0.75])
def test_axiom_divides_by_a_power_of_the_second_moment(power):
    grads, _ = gradients(3)
    whole, partly = (POWERS(power=p, law=PASSIVE) for p in (1.0, power))
    params, states = tree(), [whole.init(tree()), partly.init(tree())]
    for t in range(3):
        g = at(grads, t)
        (full, states[0]), (got, states[1]) = (
            tx.update(g, state, params) for tx, state in zip((whole, partly), states, strict=True)
        )
        # u = g v^(-1/2) at 1, so that g (u / g)^power is the same at a power.
        want = jax.tree.map(lambda g, u: -0.01 * g * (u / (-0.01 * g)) ** power, g, full)
        assert_close(got, want, ulps=128)
    assert_same(states[0].inner_state[1], states[1].inner_state[1])


def test_axiom_of_power_one_is_axiom_to_the_bit():
    grads, losses = gradients(5)
    want, got = (train(tx, tree(), grads, losses) for tx in (POWERS(), POWERS(power=1)))
    assert_same(got, want)


def test_derivative_of_a_partial_power_is_finite_at_zero():
    tx, zeros = scale_by_factored_rms(0.8, 4, power=0.75), jax.tree.map(jnp.zeros_like, tree())

    def moved(grads):
        return sum(map(jnp.sum, jax.tree.leaves(tx.update(grads, tx.init(grads))[0])))

    slopes = jax.grad(moved)(zeros)
    assert all(bool(jnp.isfinite(slope).all()) for slope in jax.tree.leaves(slopes))


WRONG = [
    (lambda: soften_sign(-0.1), r"temperature must be in \[0, infinity\), got -0.1"),
    (lambda: blend_sign(1.2), r"weight must be in \[0, 1\], got 1.2"),
    (lambda: scale_by_trust_ratio_ema(0.0), r"cap must be in \(0, infinity\], got 0.0"),
    (lambda: scale_by_trust_ratio_ema(decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
    (lambda: scale_by_trust_ratio_ema(floor=0.0), r"floor must be in \(0, infinity\), got 0.0"),
    (lambda: scale_by_trust_ratio_ema(per="column"), "per must be one of .* got 'column'"),
    (lambda: scale_by_trust_ratio_ema(space="precond"), "space must be one of .* got 'precond'"),
    (lambda: scale_by_trust_ratio_ema(space="momentum"), "and direction come together"),
    (lambda: scale_by_trust_ratio_ema(slices=QKV), "and slices come together"),
    (lambda: clip_by_parameter_norm(0.0), r"clip must be in \(0, infinity\), got 0.0"),
    (lambda: clip_by_rms(-1.0), r"limit must be in \(0, infinity\), got -1.0"),
    (lambda: clip_by_rms(per="slice"), "per must be one of .* got 'slice'"),
    (lambda: scale_by_slices(QKV, {"q": -1.0}), r"rates\['q'\] must be in \[0, infinity\), got"),
    (lambda: balance_slices(QKV, every=0), "every must be a whole number >= 1, got 0"),
    (lambda: balance_slices(QKV, clip=1.0), r"clip must be in \(0, 1\), got 1.0"),
    (lambda: balance_slices(QKV, bounds=(1.1, 1.3)), "bounds must contain 1"),
    (lambda: axiom(power=1.5), r"power must be in \[0, 1\], got 1.5"),
    (lambda: axiom(power=-0.5), r"power must be in \[0, 1\], got -0.5"),
    (lambda: scale_by_slices({"x": QKV["w"]}, {}).init(tree()), "got 'x', which is none of b"),
    (lambda: scale_by_slices(QKV, {"z": 2.0}), r"slices .* got \['z'\]"),
    (lambda: balance_slices({"b": QKV["w"]}).init(tree()), "along an axis of b, got axis 1"),
    (lambda: balance_slices(QKV).update(tree(), balance_slices(QKV).init(tree())), "params=None"),
    (lambda: clip_by_parameter_norm().update(tree(), optax.EmptyState()), "params=None"),
    (lambda: scale_by_trust_ratio_ema().update(tree(), None), "params=None"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_wrong_value(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert ";" in str(error.value), "the remedy follows"


def test_momentum_outside_stabilize_says_where_it_belongs():
    tx, params = scale_by_controlled_momentum(), tree()
    with pytest.raises(ValueError, match=r"scale_by_controlled_momentum\(\) must run inside"):
        tx.update(params, tx.init(params), params)
