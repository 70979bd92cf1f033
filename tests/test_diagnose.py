"""`diagnose`: what it measures of a step in JAX, and what it names."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cruxy_optax
from cruxy_control import Meta3
from cruxy_control.diagnosis import Stats, pooled
from cruxy_optax import diagnose
from jax_versions import as_pure

NAN = jnp.nan


def tree(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "wte": {"embedding": leaf(16, 8)},
        "attn": {"query": {"kernel": leaf(64, 64), "bias": leaf(64)}},
        "norm": {"scale": leaf(8)},
    }


def rms(*leaves):
    flat = np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves])
    return float(np.sqrt(np.mean(flat**2)))


def names(diagnosis):
    return [(found.name, found.where, found.count) for found in diagnosis.nonfinite]


def planted(params, path, value=NAN, index=0):
    """The tree with one number replaced."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [
        leaf.reshape(-1).at[index].set(value).reshape(leaf.shape)
        if ".".join(k.key for k in where) == path
        else leaf
        for where, leaf in flat
    ]
    return treedef.unflatten(leaves)


def stepped(tx, params=None, grads=None, steps=1):
    params = tree() if params is None else params
    grads = tree(seed=1) if grads is None else grads
    state = tx.init(params)
    updates = None
    for _ in range(steps):
        updates, state = tx.update(grads, state, params, value=1.0)
    return params, grads, updates, state


class TestNumbers:
    @pytest.mark.parametrize("jit", [True, False])
    def test_sizes_are_those_of_numpy(self, jit):
        params, grads, updates = (tree(seed=seed) for seed in range(3))
        found = (jax.jit(diagnose) if jit else diagnose)(params, grads, updates)
        for tensor in found.tensors:
            *above, last = tensor.name.split(".")
            at = [x for part in (params, grads, updates) for x in [_at(part, above)[last]]]
            want = dict(zip(("parameter", "gradient", "update"), map(rms, at), strict=True))
            assert {k: v.rms for k, v in tensor.values.items()} == pytest.approx(want, rel=1e-5)
            assert tensor.ratio == pytest.approx(want["update"] / want["parameter"], rel=1e-5)

    def test_labels_say_what_is_added_up(self):
        params = tree()
        labels = jax.tree.map(lambda p: "matrices" if p.ndim > 1 else "rest", params)
        role = diagnose(params, labels=labels).roles["rest"]
        leaves = [p for p in jax.tree.leaves(params) if p.ndim == 1]
        assert (role.tensors, role.values["parameter"].elements) == (2, 72)
        assert role.values["parameter"].rms == pytest.approx(rms(*leaves), rel=1e-5)

    def test_roles_are_the_default(self):
        assert list(diagnose(tree()).roles) == ["bias", "attention.q", "norm", "embedding"]

    def test_half_precision_is_measured_in_float32(self):
        params = tree(jnp.bfloat16)
        kernel = params["attn"]["query"]["kernel"]
        found = diagnose(params).roles["attention.q"].values["parameter"].rms
        assert found == pytest.approx(rms(kernel.astype(jnp.float32)), rel=1e-5)

    def test_coded_leaves_are_decoded(self):
        params = {"wte": {"embedding": tree()["attn"]["query"]["kernel"]}}
        tx = cruxy_optax.quantize_state(optax.trace(0.9), bits=8)
        _, state = tx.update(params, tx.init(params))
        coded = state.inner_state.trace
        found = jitted(coded).roles["embedding"].values["parameter"]
        assert found.elements == 4096
        assert found.rms == pytest.approx(rms(coded["wte"]["embedding"].decode()), rel=1e-5)

    def test_numbers_whose_squares_overflow_have_a_size(self):
        found = diagnose({"w": jnp.full((3, 3), 1e30)}).roles["matrix"].values["parameter"]
        assert found.rms == pytest.approx(1e30, rel=1e-6)

    def test_size_is_that_of_the_finite_numbers(self):
        params = {"w": jnp.array([2.0, jnp.inf, 2.0, NAN])}
        assert diagnose(params).tensors[0].values["parameter"] == (4, 2.0, 2)

    def test_what_is_missing_is_left_out(self):
        params, grads = tree(), tree(seed=1)
        grads["norm"]["scale"] = None
        grads["wte"]["embedding"] = optax.MaskedNode()
        values = {t.name: list(t.values) for t in diagnose(params, grads).tensors}
        assert values == {
            "attn.query.bias": ["parameter", "gradient"],
            "attn.query.kernel": ["parameter", "gradient"],
            "norm.scale": ["parameter"],
            "wte.embedding": ["parameter"],
        }

    def test_leaves_that_are_no_numbers_are_left_out(self):
        params = {"w": jnp.ones(2), "count": jnp.zeros((), jnp.int32), "empty": jnp.zeros((0, 3))}
        assert [t.name for t in diagnose(params).tensors] == ["empty", "w"]

    @pytest.mark.parametrize("params", [{}, {"count": jnp.zeros(2, jnp.int32)}])
    @pytest.mark.parametrize("jit", [True, False])
    def test_without_numbers_there_is_nothing_to_show(self, params, jit):
        found = (jax.jit(diagnose) if jit else diagnose)(params)
        assert (found.rms.shape, found.tensors, found.roles) == ((0,), (), {})
        assert str(found) == "root mean squares by role:\n\neverything is finite"

    def test_states_of_nnx_with_updates_without_boxes(self):
        net = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        params = nnx.state(net, nnx.Param)
        updates = jax.tree.map(jnp.ones_like, as_pure(params))
        found = diagnose(params, params, updates)
        assert [t.name for t in found.tensors] == ["bias", "kernel"]
        assert found.tensors[1].values["update"].rms == 1.0

    def test_several_tensors_are_as_one(self):
        assert pooled([Stats(3, 1.0, 1), Stats(6, 4.0, 0), Stats(2, 0.0, 2)]) == Stats(
            11, pytest.approx(np.sqrt((2 * 1.0 + 6 * 16.0) / 8)), 3
        )


def _at(node, path):
    for key in path:
        node = node[key]
    return node


EVERY = ["wte.embedding", "attn.query.kernel", "attn.query.bias", "norm.scale"]


class TestNames:
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    @pytest.mark.parametrize("where", ["parameter", "gradient", "update"])
    @pytest.mark.parametrize("path", EVERY)
    def test_one_planted_anywhere_is_named(self, path, where, dtype):
        parts = {kind: tree(dtype) for kind in ("parameter", "gradient", "update")}
        parts[where] = planted(parts[where], path, index=-1)
        found = jitted(*parts.values())
        assert names(found) == [(path, where, 1)]
        assert f"  {path}: {where} (1 of " in str(found)

    def test_infinities_are_named_too(self):
        assert names(diagnose(planted(tree(), "norm.scale", -jnp.inf))) == [
            ("norm.scale", "parameter", 1)
        ]

    def test_nothing_is_named_where_all_is_well(self):
        params, grads, updates, state = stepped(cruxy_optax.self_driving(state_bits=8), steps=2)
        found = diagnose(params, grads, updates, opt_state=state)
        assert found.nonfinite == ()
        assert str(found).endswith("everything is finite")

    @pytest.mark.parametrize("moment", ["mu", "nu"])
    @pytest.mark.parametrize("bits", [32, 16, 8, 4])
    def test_one_in_a_moment_is_named_by_its_path(self, bits, moment):
        tx = cruxy_optax.meta3(1e-3, state_bits=bits)
        params, _, _, state = stepped(tx)

        def spoil(path, leaf):
            key = jax.tree_util.keystr(path)
            scales = ".scales" in key if bits < 16 else True
            if f".{moment}['attn']['query']['kernel']" in key and scales:
                return leaf.reshape(-1).at[3].set(NAN).reshape(leaf.shape)
            return leaf

        found = diagnose(params, opt_state=jax.tree_util.tree_map_with_path(spoil, state))
        ((name, where, count),) = names(found)
        assert (where, count) == ("state", 256 if bits < 16 else 1)
        assert name.startswith("opt_state")
        assert name.endswith(f".{moment}['attn']['query']['kernel']")

    def test_one_in_a_state_of_optax_is_named(self):
        params, _, _, state = stepped_optax(optax.adam(1e-3))
        spoiled = (state[0]._replace(nu=planted(state[0].nu, "norm.scale")), *state[1:])
        assert names(diagnose(params, opt_state=spoiled)) == [
            ("opt_state[0].nu['norm']['scale']", "state", 1)
        ]

    def test_one_in_the_law_is_named(self):
        params, _, _, state = stepped(cruxy_optax.meta3(1e-3))
        leaves, treedef = jax.tree.flatten(state.law_state)
        first = next(i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating))
        leaves[first] = jnp.full_like(leaves[first], NAN)
        spoiled = state._replace(law_state=treedef.unflatten(leaves))
        ((name, where, _),) = names(diagnose(params, opt_state=spoiled))
        assert (name.startswith("opt_state.law_state."), where) == (True, "state")

    def test_a_gradient_that_the_guard_kept_out_is_the_only_one(self):
        grads = planted(tree(seed=1), "attn.query.bias")
        params, grads, updates, state = stepped(cruxy_optax.meta3(1e-3), grads=grads)
        found = diagnose(params, grads, updates, opt_state=state)
        assert names(found) == [("attn.query.bias", "gradient", 1)]
        assert str(found).startswith("0 steps, 1 skipped, the last one skipped; ")


jitted = jax.jit(diagnose)


def stepped_optax(tx):
    params, grads = tree(), tree(seed=1)
    updates, state = tx.update(grads, tx.init(params), params)
    return params, grads, updates, state


class TestWhatBinds:
    @pytest.mark.parametrize("threshold", [0.5, None])
    def test_a_clip_that_binds_is_seen(self, threshold):
        tx = cruxy_optax.meta3(1e-3, law=Meta3(clip_threshold=threshold))
        found = diagnose(*stepped(tx)[:3], opt_state=stepped(tx)[3])
        assert found.clip_binds == (threshold is not None)

    @pytest.mark.parametrize("limit", [1e-3, 1e3])
    def test_a_limit_that_binds_is_seen(self, limit):
        tx = cruxy_optax.self_driving(1e-2, relative_limit=limit)
        params, grads, updates, state = stepped(tx, steps=2)
        found = diagnose(params, grads, updates, opt_state=state)
        assert found.limit_binds == (limit == 1e-3)
        assert ("relative limits bind" in str(found)) == (limit == 1e-3)

    def test_rate_is_that_of_telemetry(self):
        params, grads, updates, state = stepped(cruxy_optax.meta3(1e-3))
        found = diagnose(params, grads, updates, opt_state=state)
        assert found.controls[""]["learning_rate"] == pytest.approx(7.5e-4)
        assert "learning rate 7.50e-04" in str(found)

    def test_several_controllers_have_a_line_each(self):
        tx = optax.partition(
            {"a": cruxy_optax.meta3(1e-3), "b": cruxy_optax.meta_lion(1e-4)},
            {"wte": "a", "attn": "b", "norm": "a"},
        )
        params, grads, updates, state = stepped(tx)
        text = str(diagnose(params, grads, updates, opt_state=state))
        assert [line.count("learning rate") for line in text.splitlines()[:2]] == [1, 1]

    def test_several_rates_are_a_range(self):
        tx = cruxy_optax.stabilize(
            optax.partition(
                {
                    "a": cruxy_optax.scale_by_meta_learning_rate(1e-3),
                    "b": cruxy_optax.scale_by_meta_learning_rate(1e-2),
                },
                {"wte": "a", "attn": "b", "norm": "a"},
            )
        )
        params, grads, updates, state = stepped(tx)
        text = str(diagnose(params, grads, updates, opt_state=state))
        assert "learning rate 1.00e-03 to 1.00e-02" in text


class TestUse:
    def test_it_is_read_from_the_device_once(self, monkeypatch):
        params, grads, updates, state = stepped(cruxy_optax.meta3(1e-3))
        found = diagnose(params, grads, updates, opt_state=state)
        read = []
        original = jax.device_get

        def device_get(x):
            read.extend(leaf for leaf in jax.tree.leaves(x) if isinstance(leaf, jax.Array))
            return original(x)

        monkeypatch.setattr(jax, "device_get", device_get)
        str(found)
        assert len(read) == len(jax.tree.leaves(found))

    def test_in_a_scan_every_step_has_one(self):
        tx = cruxy_optax.meta3(1e-3)
        params, grads = tree(), tree(seed=1)

        def step(carry, scale):
            params, state = carry
            scaled = jax.tree.map(lambda g: g * scale, grads)
            updates, state = tx.update(scaled, state, params, value=1.0)
            return (optax.apply_updates(params, updates), state), diagnose(params, scaled, updates)

        _, found = jax.lax.scan(step, (params, tx.init(params)), jnp.array([1.0, NAN, 1.0]))
        counts = [len(jax.tree.map(lambda x, i=i: x[i], found).nonfinite) for i in range(3)]
        assert counts == [0, 4, 0]
        with pytest.raises(ValueError, match="must be that of one step, got one of shape"):
            str(found)

    def test_sharded_arrays_are_measured_as_a_whole(self):
        devices = jax.devices()[:4]
        if len(devices) < 4:
            pytest.skip("needs four devices")
        mesh = jax.sharding.Mesh(np.array(devices), ("x",))
        split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        whole = planted(tree(), "attn.query.kernel", index=-1)
        kernel = jax.device_put(whole["attn"]["query"]["kernel"], split)
        found = jitted({"attn": {"query": {"kernel": kernel}}})
        assert names(found) == [("attn.query.kernel", "parameter", 1)]
        values = np.asarray(whole["attn"]["query"]["kernel"]).ravel()[:-1]
        got = found.roles["attention.q"].values["parameter"].rms
        assert got == pytest.approx(rms(values), rel=1e-5)

    @pytest.mark.parametrize("name", ["grads", "updates", "labels"])
    def test_another_tree_is_refused(self, name):
        with pytest.raises(ValueError, match=f"{name} must be a tree like the parameters"):
            diagnose(tree(), **{name: {"other": jnp.ones(3)}})
