"""COSMIC keeps its budget to the byte, and what survives a new plan survives it untouched."""

import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cruxy_optax
from cruxy_control import Meta3
from cruxy_optax import cosmic, estimate_memory, meta3, retier, tier_plan
from cruxy_optax._memory.estimate import tree_bytes
from optimizers import assert_close, assert_same
from relatives import crossed, relatives

PASSIVE = Meta3(
    phase_strength=0.0,
    rate_gain=0.0,
    beta1_gain=0.0,
    beta2_phase_strength=0.0,
    beta2_gain=0.0,
    clip_threshold=None,
)


def model():
    """Four tensors of 16 to 20 KB of moments, and a small one."""
    return {
        "a": jnp.ones((40, 50)),
        "b": jnp.ones((45, 50)),
        "c": jnp.ones((50, 50)),
        "d": {"w": jnp.ones((64, 64)), "gain": jnp.ones(7)},
    }


def loud(seed=0, **sizes):
    """Gradients of these sizes by tensor, 1 where nothing is said."""
    rng = np.random.default_rng(seed)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), model())
    flat, tree = jax.tree_util.tree_flatten_with_path(grads)
    return tree.unflatten([sizes.get(path[-1].key, 1.0) * g for path, g in flat])


def run(tx, gradients, state=None, every=2, log=None):
    """Trains, plans anew every few steps, and says what each plan did."""
    params, update, done = model(), jax.jit(tx.update), []
    state = tx.init(params) if state is None else state
    for step, grads in enumerate(gradients, start=1):
        updates, state = update(grads, state, params, value=1.0)
        params = optax.apply_updates(params, updates)
        if step % every == 0:
            state, what = retier(state, params, log=log)
            done.append(what)
    return params, state, done


def tiers(state):
    """Tier by the last key of the path."""
    return {name.split("'")[-2]: tier for name, tier in tier_plan(state).tiers}


@pytest.mark.parametrize(
    ("budget", "state_bits"), crossed([600, 1000, 20_000, 50_000, 200_000], [32, 4])
)
def test_all_of_the_state_stays_within_the_budget_whatever_the_plan(budget, state_bits):
    tx = cosmic(1e-3, budget, state_bits=state_bits)
    assert estimate_memory(tx, model()).state <= budget
    grads = [loud(t, a=10.0 ** (t % 3), c=10.0 ** -(t % 5)) for t in range(8)]
    _, state, done = run(tx, grads)
    assert all(what["bytes"] <= budget for what in done)
    assert tree_bytes(state) == done[-1]["bytes"]


def test_a_new_plan_may_have_another_budget():
    grads = [loud(t, a=3.0) for t in range(4)]
    params, state, _ = run(cosmic(1e-3, 200_000), grads)
    state, done = retier(state, params, state_budget="20KB")
    assert done["budget"] == tier_plan(state).budget == 20_000
    assert tree_bytes(state) == done["bytes"] <= 20_000
    state, done = retier(state, params)
    assert done["budget"] == 20_000
    with pytest.raises(ValueError, match="state_budget must be at least"):
        retier(state, params, state_budget=10)
    run(cosmic(1e-3, 200_000), grads, state)


def test_a_budget_that_cannot_be_met_is_refused_with_the_smallest_that_can():
    with pytest.raises(ValueError, match="state_budget must be at least") as refused:
        cosmic(1e-3, 100).init(model())
    least = int(str(refused.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))
    state = cosmic(1e-3, least).init(model())
    assert tree_bytes(state) == least
    assert set(tiers(state).values()) == {0}
    with pytest.raises(ValueError, match="state_budget must be at least"):
        cosmic(1e-3, least - 1).init(model())


def test_with_room_for_everything_it_is_meta3():
    # A gradient of one size is not gated.
    grads = [jax.tree.map(lambda p, t=t: jnp.full_like(p, (-1.0) ** t), model()) for t in range(6)]
    got, _, _ = run(cosmic(1e-2, "1MB", weight_decay=0.1), grads)
    tx, want = meta3(1e-2, weight_decay=0.1), model()
    state = tx.init(want)
    for g in grads:
        updates, state = tx.update(g, state, want, value=1.0)
        want = optax.apply_updates(want, updates)
    assert_close(got, want, ulps=256)


def one_update(tx, grads, state=None):
    params = model()
    return tx.update(grads, tx.init(params) if state is None else state, params)


def plan(**own):
    """A plan by last key, at tier 0 where nothing is said."""
    flat, _ = jax.tree_util.tree_flatten_with_path(model())
    return {jax.tree_util.keystr(path): own.get(path[-1].key, 0) for path, _ in flat}


def test_tier_0_is_a_sign_and_tier_1_a_sign_scaled_within_its_group():
    tx = cosmic(1.0, 5000, weight_decay=0.0, law=PASSIVE, tiers=plan(a=1, b=1))
    updates, _ = one_update(tx, loud(a=3.0, b=1.0, c=100.0))
    np.testing.assert_allclose(np.abs(updates["c"]), 0.2, rtol=1e-6)
    # Mean squares 9 and 1, of which the mean is 5: roots of 5/9 and 5, held to at most 2.
    np.testing.assert_allclose(np.abs(updates["a"]), 0.2 * np.sqrt(5 / 9), rtol=0.05)
    np.testing.assert_allclose(np.abs(updates["b"]), 0.2 * 2.0, rtol=1e-6)


def test_the_scale_of_tier_1_moves_with_the_gradients():
    tx = cosmic(1.0, 5000, weight_decay=0.0, law=PASSIVE, tiers=plan(a=1, b=1))
    state, sizes = None, []
    for t in range(4):
        updates, state = one_update(tx, loud(t, a=1.0, b=2.0**-t), state)
        sizes.append(float(jnp.max(jnp.abs(updates["b"]))))
    assert sizes == sorted(sizes)
    assert sizes[-1] > 1.05 * sizes[0]


def test_a_tensor_whose_gradient_grows_is_gated_and_one_whose_gradient_falls_is_not():
    tx = cosmic(1.0, 5000, weight_decay=0.0, law=PASSIVE, tiers=plan())
    state = None
    for t in range(30):
        updates, state = one_update(
            tx, loud(t, a=1.0 if t < 25 else 9.0, b=1.0 if t < 25 else 0.1), state
        )
    assert float(jnp.max(jnp.abs(updates["a"]))) < 0.2 * 0.8
    np.testing.assert_allclose(np.abs(updates["b"]), 0.2, rtol=1e-6)


def three_of_four(**options):
    """Has room for the moments of any three of the large tensors; `w` is the one without."""
    start = plan(a=2, b=2, c=2, gain=2, w=1)
    return cosmic(1e-3, 75_000, weight_decay=0.0, tiers=start, **options)


def test_moments_follow_the_gradients_and_survivors_keep_theirs_to_the_bit():
    tx, params = three_of_four(), model()
    state = tx.init(params)
    for t in range(3):
        _, state = tx.update(loud(t, a=0.01, w=5.0), state, params)
    before = tier_node(state).tensors
    state, done = retier(state, params)
    after = tier_node(state).tensors
    assert [(c["name"], c["from"], c["to"]) for c in done["transitions"]] == [
        ("['a']", 2, 1),
        ("['d']['w']", 1, 2),
    ]
    for name in ("b", "c"):
        assert_same(after[name], before[name])
    assert after["a"].shape == ()
    np.testing.assert_allclose(after["a"], 1e-4, rtol=0.1)  # its mean square
    assert not jnp.any(after["d"]["w"].mu)


def tier_node(state):
    return next(
        node
        for node in jax.tree.leaves(
            state, is_leaf=lambda n: isinstance(n, cruxy_optax.ScaleByTiersState)
        )
        if isinstance(node, cruxy_optax.ScaleByTiersState)
    )


def test_a_tensor_promoted_late_starts_its_own_bias_correction():
    tx, params, state = three_of_four(law=PASSIVE), model(), None
    for t in range(20):
        _, state = one_update(tx, loud(t, a=0.1, w=1.5), state)
    state, _ = retier(state, params)
    assert tiers(state)["w"] == 2
    grads = loud(21, a=0.1, w=1.5)
    updates, _ = one_update(tx, grads, state)
    # Adam's first step is a sign, Nesterov's look ahead included. Without a correction of its own
    # the second moment would stand for a thousandth of it, and the step be 30 times as large.
    step = np.max(np.abs(updates["d"]["w"]))
    assert 0.8e-3 < step <= 1.00001e-3  # gated, at most
    np.testing.assert_allclose(updates["d"]["w"], -step * np.sign(grads["d"]["w"]), rtol=1e-3)


@pytest.mark.parametrize(("hysteresis", "flaps"), [(0.2, False), (0.0, True)])
def test_hysteresis_keeps_near_equals_from_taking_turns(hysteresis, flaps):
    params = {"a": jnp.ones((40, 50)), "b": jnp.ones((40, 50))}
    tx = cosmic(1e-3, 20_000, hysteresis=hysteresis)
    state, changes = tx.init(params), 0
    for t in range(12):
        sizes = (1.1, 1.0) if t % 4 < 2 else (1.0, 1.2)
        grads = {name: size * params[name] for name, size in zip(params, sizes, strict=True)}
        _, state = tx.update(grads, state, params)
        state, done = retier(state, params)
        changes += len(done["transitions"])
    assert (changes > 0) == flaps


def test_equal_runs_make_equal_plans_and_equal_parameters(tmp_path):
    grads = [loud(t, a=10.0 ** (t % 3)) for t in range(6)]
    logs = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    (first, _, _), (second, _, _) = (run(cosmic(1e-3, 50_000), grads, log=log) for log in logs)
    assert_same(first, second)
    assert logs[0].read_bytes() == logs[1].read_bytes()


def test_the_log_has_a_line_of_json_for_every_plan(tmp_path):
    log = tmp_path / "tiers.jsonl"
    grads = [loud(t, a=0.01 * 10.0**t, w=5.0) for t in range(4)]
    _, state, done = run(three_of_four(), grads, log=log)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines == done
    assert [line["step"] for line in lines] == [2, 4]
    assert {"name", "from", "to", "rms", "bytes"} == set(lines[0]["transitions"][0])
    assert "['a']" in lines[-1]["gates"]
    assert sum(lines[-1]["tensors"]) == len(tier_plan(state).tiers)


def test_a_step_compiles_again_only_where_the_plan_has_changed():
    tx, params, traced = three_of_four(), model(), []

    @jax.jit
    def step(grads, state):
        traced.append(1)
        return tx.update(grads, state, params)

    state = tx.init(params)
    for t in range(3):
        _, state = step(loud(t, a=0.01, w=5.0), state)
    state, done = retier(state, params)
    assert done["transitions"]
    for t in range(3):
        _, state = step(loud(t, a=0.01, w=5.0), state)
    state, done = retier(state, params)
    assert not done["transitions"]
    _, state = step(loud(9), state)
    assert len(traced) == 2


def test_before_the_first_step_nothing_is_planned_anew():
    tx, params = cosmic(1e-3, 60_000), model()
    state = tx.init(params)
    after, done = retier(state, params)
    assert done["transitions"] == []
    assert_same(after, state)


def test_a_run_goes_on_from_a_checkpoint_of_any_plan(tmp_path):
    grads = [loud(t, a=0.01, w=5.0) for t in range(4)]
    params, state, done = run(three_of_four(), grads[:2])
    assert done[0]["transitions"]
    path = tmp_path / "state"
    saved = {
        "tiers": dict(tier_plan(state).tiers),
        "leaves": jax.device_get(jax.tree.leaves(state)),
    }
    path.write_bytes(pickle.dumps(saved))

    loaded = pickle.loads(path.read_bytes())
    tx = cosmic(1e-3, 75_000, weight_decay=0.0, tiers=loaded["tiers"])
    restored = jax.tree.unflatten(jax.tree.structure(tx.init(params)), loaded["leaves"])
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    step = jax.jit(tx.update)
    assert_same(step(grads[2], restored, params), step(grads[2], state, params))


def test_a_step_that_is_not_finite_changes_two_counters():
    tx, params = cosmic(1e-3, 75_000, state_bits=8, tiers=plan(a=2, b=1, w=2)), model()
    _, state = tx.update(loud(), tx.init(params), params)
    updates, after = tx.update(loud(b=jnp.nan), state, params)
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
    node, held = tier_node(after), tier_node(state)
    assert_same((node.count, node.averages), (held.count, held.averages))
    assert_same(node.tensors["b"], held.tensors["b"])
    pairs = [(n.tensors["a"], n.tensors["d"]["w"]) for n in (node, held)]
    for new, old in zip(*pairs, strict=True):
        # Codes, scales and products of decay; not the betas of the step, which say it was skipped.
        assert_same(new.inner_state[:4], old.inner_state[:4])
        assert_same(new.count, old.count)
    assert int(after.skipped_total) == 1


def test_low_bits_buy_moments_for_more_tensors():
    wide, narrow = (cosmic(1e-3, 20_000, state_bits=bits).init(model()) for bits in (32, 4))
    assert tiers(wide)["w"] < 2  # which takes 32 KB
    assert tiers(narrow)["w"] == 2


def test_it_is_found_inside_other_wrappers():
    tx, params = optax.MultiSteps(optax.chain(three_of_four(), optax.identity()), 2), model()
    state = tx.init(params)
    for t in range(2):
        _, state = tx.update(loud(t, a=0.01, w=5.0), state, params)
    state, done = retier(state, params)
    assert len(done["transitions"]) == 2
    updates, _ = jax.jit(tx.update)(loud(2), state, params)
    assert all(bool(jnp.all(jnp.isfinite(u))) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("state_bits", relatives([32, 8], [8]))
def test_it_scans_donates_and_keeps_its_dtypes(state_bits):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), model())
    tx = cosmic(1e-3, 60_000, state_bits=state_bits, tiers=plan(a=2, b=1, c=2))

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params, value=1.0)
        return (optax.apply_updates(params, updates), state), None

    advance = jax.jit(lambda carry: jax.lax.scan(body, carry, length=3)[0], donate_argnums=0)
    carry = params, tx.init(params)
    shapes = jax.eval_shape(lambda carry: carry, carry)
    params, state = advance(carry)
    assert jax.eval_shape(lambda carry: carry, (params, state)) == shapes
    state, _ = retier(state, params)
    advance((params, state))  # new moments have buffers of their own


def test_no_tensors_take_no_state_of_their_own():
    tx = cosmic(1e-3, 1000)
    updates, state = tx.update({}, tx.init({}), {}, value=1.0)
    assert updates == {}
    assert tier_plan(state).tiers == ()


def test_it_runs_where_parameters_are_sharded():
    mesh = jax.make_mesh((8,), ("data",))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    params = {"w": jnp.ones((64, 64)), "v": jnp.ones((64, 64))}
    split = jax.device_put(params, rows)
    tx = cosmic(1e-2, 40_000)
    results = []
    for one in (params, split):
        state, update = tx.init(one), jax.jit(tx.update)
        for t in range(4):
            grads = {"v": (1.0 + t) * one["v"], "w": 9.0 * one["w"]}
            updates, state = update(grads, state, one)
            if t == 1:
                state, done = retier(state, one)
                assert done["transitions"]
        results.append(updates)
        moments = tier_node(state).tensors["w"]
        assert moments.mu.sharding.is_equivalent_to(one["w"].sharding, 2)
    assert_close(*results, ulps=256)


def test_bad_arguments_say_what_to_do():
    with pytest.raises(ValueError, match=r"state_budget must be a size in bytes, got 'lots'"):
        cosmic(1e-3, "lots")
    with pytest.raises(ValueError, match=r"hysteresis must be in \[0, infinity\), got -1"):
        cosmic(1e-3, hysteresis=-1.0)
    with pytest.raises(ValueError, match=r"state_bits must be 32, 16, 8 or 4, got 2"):
        cosmic(1e-3, state_bits=2)
    with pytest.raises(ValueError, match=r"opt_state must have the state of one cosmic\(\)"):
        retier(meta3(1e-3).init(model()), model())
    state = cosmic(1e-3).init(model())
    with pytest.raises(ValueError, match=r"params must be what the state was made for, 5 tensors"):
        retier(state, {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"a plan of [\d,]+ bytes for 1,000"):
        cosmic(1e-3, 1000, tiers=plan(a=2)).init(model())
    tx = cruxy_optax.scale_by_tiers("1MB")
    state = tx.init(model())
    with pytest.raises(ValueError, match=r"scale_by_tiers\(\) must run inside stabilize"):
        tx.update(model(), state)
