"""Roles in JAX: the labels of any tree, masks for optax's own parts, and rates by role."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import cruxy_optax
from cruxy_control import SelfDriving
from cruxy_control.slices import blocks
from cruxy_optax import label_roles, qkv_slices, role_mask, role_table, scale_by_role
from jax_versions import as_pure
from optimizers import assert_same


def dotted(tree):
    """The leaves of a tree by path, `value` of nnx left out."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [
        ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", None)))) for k in path)
        for path, _ in flat
    ]
    leaves = [leaf for _, leaf in flat]
    return {n.removesuffix(".value"): leaf for n, leaf in zip(names, leaves, strict=True)}


def ones_like(params):
    return jax.tree.map(jnp.ones_like, params)


class Mlp(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(8, name="c_proj")(linen.gelu(linen.Dense(32, name="c_fc")(x)))


class Block(linen.Module):
    @linen.compact
    def __call__(self, x):
        h = linen.LayerNorm()(x)
        x = x + linen.MultiHeadDotProductAttention(num_heads=2, name="attn")(h)
        return x + Mlp(name="mlp")(linen.RMSNorm(name="ln_2")(x))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(16, 8, name="wte")(tokens)
        x = x + linen.Embed(4, 8, name="wpe")(jnp.arange(tokens.shape[1]))
        x = Block(name="h_0")(x)
        x = linen.Conv(8, (2,))(x)
        x = linen.Dense(8)(x)
        return linen.Dense(16, use_bias=False, name="lm_head")(linen.LayerNorm(name="ln_f")(x))


LINEN = {
    "wte.embedding": "embedding",
    "wpe.embedding": "position",
    "h_0.LayerNorm_0.scale": "norm",
    "h_0.LayerNorm_0.bias": "norm.bias",
    "h_0.attn.query.kernel": "attention.q",
    "h_0.attn.key.kernel": "attention.k",
    "h_0.attn.value.kernel": "attention.v",
    "h_0.attn.out.kernel": "attention.out",
    "h_0.attn.query.bias": "bias",
    "h_0.attn.key.bias": "bias",
    "h_0.attn.value.bias": "bias",
    "h_0.attn.out.bias": "bias",
    "h_0.ln_2.scale": "norm",
    "h_0.mlp.c_fc.kernel": "mlp.up",
    "h_0.mlp.c_fc.bias": "bias",
    "h_0.mlp.c_proj.kernel": "mlp.down",
    "h_0.mlp.c_proj.bias": "bias",
    "Conv_0.kernel": "conv",
    "Conv_0.bias": "bias",
    "Dense_0.kernel": "matrix",  # which linen names alike, whatever it is for
    "Dense_0.bias": "bias",
    "ln_f.scale": "norm",
    "ln_f.bias": "norm.bias",
    "lm_head.kernel": "head",
}


@pytest.fixture(scope="module")
def linen_params():
    return Linen().init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.gate_proj = nnx.Linear(8, 16, rngs=rngs)
        self.up_proj = nnx.Linear(8, 16, rngs=rngs)
        self.down_proj = nnx.Linear(16, 8, rngs=rngs)


class Bottleneck(nnx.Module):
    """Names that say nothing: the classes do."""

    def __init__(self, rngs):
        self.first = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.second = nnx.BatchNorm(8, rngs=rngs)
        self.third = nnx.Embed(4, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, 8)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.tokens = nnx.Embed(16, 8, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(
            num_heads=2, in_features=8, qkv_features=8, decode=False, rngs=rngs
        )
        self.mlp = NnxMlp(rngs)
        chain = [Bottleneck(rngs)]
        self.chain = nnx.List(chain) if hasattr(nnx, "List") else chain  # flax 0.11 has none
        self.ffn = nnx.Sequential(
            nnx.Linear(8, 16, rngs=rngs), jax.nn.gelu, nnx.Linear(16, 8, rngs=rngs)
        )
        self.fc = nnx.LoRALinear(8, 4, lora_rank=2, rngs=rngs)


NNX = {
    "tokens.embedding": "embedding",
    "attn.query.kernel": "attention.q",
    "attn.key.kernel": "attention.k",
    "attn.value.kernel": "attention.v",
    "attn.out.kernel": "attention.out",
    "mlp.gate_proj.kernel": "mlp.gate",
    "mlp.up_proj.kernel": "mlp.up",
    "mlp.down_proj.kernel": "mlp.down",
    "chain.0.first.kernel": "conv",
    "chain.0.second.scale": "norm",
    "chain.0.second.bias": "norm.bias",
    "chain.0.third.embedding": "embedding",
    "chain.0.cls_token": "position",
    "ffn.layers.0.kernel": "mlp.up",
    "ffn.layers.2.kernel": "mlp.down",
    "fc.kernel": "head",
    "fc.lora.lora_a": "lora.a",
    "fc.lora.lora_b": "lora.b",
}


def attributes(cls):
    """A module that is a pytree of its attributes, as Equinox has them."""
    cls = dataclasses.make_dataclass(cls.__name__, cls.__annotations__)
    return jax.tree_util.register_dataclass(cls, list(cls.__annotations__), [])


@attributes
class Linear:
    weight: object
    bias: object


@attributes
class LayerNorm:
    weight: object
    bias: object


@attributes
class MultiheadAttention:
    query_proj: object
    key_proj: object


@attributes
class Model:
    first: object
    second: object
    fc: object


@pytest.fixture(scope="module")
def net():
    return NnxNet(nnx.Rngs(0))


class TestLabels:
    def test_linen(self, linen_params):
        assert dotted(label_roles(linen_params)) == LINEN

    def test_variables_of_linen_are_labelled_as_their_parameters(self, linen_params):
        assert label_roles({"params": linen_params})["params"] == label_roles(linen_params)

    def test_nnx_state_with_its_model(self, net):
        found = dotted(label_roles(nnx.state(net, nnx.Param), net))
        biases = {k: v for k, v in found.items() if k not in NNX}
        assert {k: found[k] for k in NNX} == NNX
        assert set(biases.values()) == {"bias"}

    def test_nnx_state_alone_is_never_wrong(self, net):
        found = dotted(label_roles(nnx.state(net, nnx.Param)))
        untold = {
            "chain.0.first.kernel": "conv",  # four axes
            "ffn.layers.0.kernel": "matrix",
            "ffn.layers.2.kernel": "matrix",
            "fc.kernel": "matrix",
        }
        assert {k: found[k] for k in NNX} == NNX | untold

    def test_nnx_module_has_its_own_classes(self, net):
        found = dotted(label_roles(net))
        assert {k: found[k] for k in NNX} == NNX

    def test_pure_dictionaries_of_nnx(self, net):
        pure = nnx.to_pure_dict(nnx.state(net, nnx.Param))
        found = dotted(label_roles(pure, net))
        assert {k: found[k] for k in NNX} == NNX

    def test_modules_that_are_trees_of_attributes(self):
        matrix, vector = jnp.ones((8, 8)), jnp.ones(8)
        attention = MultiheadAttention(Linear(matrix, None), Linear(matrix, None))
        model = Model(LayerNorm(vector, vector), attention, Linear(matrix, vector))
        assert dotted(label_roles(model)) == {
            "first.weight": "norm",
            "first.bias": "norm.bias",
            "second.query_proj.weight": "attention.q",
            "second.key_proj.weight": "attention.k",
            "fc.weight": "head",
            "fc.bias": "bias",
        }

    def test_a_module_called_value_and_the_key_of_a_box_are_told_apart(self):
        boxed = {"attn": {"value": {"kernel": {"value": jnp.ones((4, 4))}}, "query": {"w": 0.0}}}
        assert dotted(label_roles(boxed))["attn.value.kernel"] == "attention.v"

    def test_labels_have_the_structure_of_the_parameters(self, net, linen_params):
        for params in (linen_params, net, [jnp.ones(2), (jnp.ones(3),)]):
            assert jax.tree.structure(label_roles(params)) == jax.tree.structure(params)

    def test_labels_of_a_state_fit_its_variables_and_its_arrays(self, net):
        state = nnx.state(net, nnx.Param)
        labels = label_roles(state, net)
        for params in (state, as_pure(state)):
            assert jax.tree.map(lambda role, _: role, labels, params) == labels

    def test_shapes_will_do(self, linen_params):
        shapes = jax.eval_shape(lambda: linen_params)
        assert label_roles(shapes) == label_roles(linen_params)

    def test_layers_that_are_stacked_keep_their_roles(self, linen_params):
        stacked = jax.tree.map(lambda x: jnp.stack([x] * 3), linen_params["h_0"])
        assert label_roles({"h": stacked})["h"] == label_roles(linen_params)["h_0"]

    @pytest.mark.parametrize("layers", [(), (12,)])
    def test_w_and_b_of_layers_that_are_stacked_or_not(self, layers):
        params = {
            "attn": {"q": {"w": (8, 8), "b": (8,)}, "k": {"w": (8, 8), "b": (8,)}},
            "ln_1": {"w": (8,), "b": (8,)},
            "mlp": {"up": {"w": (8, 32), "b": (32,)}},
        }
        params = jax.tree.map(
            lambda shape: jnp.ones(layers + shape), params, is_leaf=lambda x: isinstance(x, tuple)
        )
        assert dotted(label_roles(params)) == {
            "attn.q.w": "attention.q",
            "attn.q.b": "bias",
            "attn.k.w": "attention.k",
            "attn.k.b": "bias",
            "ln_1.w": "norm",
            "ln_1.b": "norm.bias",
            "mlp.up.w": "mlp.up",
            "mlp.up.b": "bias",
        }

    @pytest.mark.parametrize("weight", ["kernel", "w"])
    @pytest.mark.parametrize("layers", [(), (12,)])
    def test_a_scale_beside_a_weight_is_a_vector(self, weight, layers):
        layer = {weight: jnp.ones((*layers, 4, 4)), "scale": jnp.ones((*layers, 4))}
        params = {"attn": {"q_proj": layer, "k_proj": layer}}
        assert label_roles(params)["attn"]["q_proj"] == {weight: "attention.q", "scale": "vector"}

    def test_an_array_alone(self):
        assert label_roles(jnp.ones((3, 3))) == "matrix"

    def test_rules_come_first(self, linen_params):
        found = label_roles(linen_params, rules=[("Dense_*.kernel", "mlp.up"), ("*", "matrix")])
        assert found["Dense_0"] == {"kernel": "mlp.up", "bias": "matrix"}

    def test_under_jit(self, linen_params):
        seen = []
        jax.jit(lambda params: seen.append(label_roles(params)))(linen_params)
        assert seen == [label_roles(linen_params)]

    @pytest.mark.parametrize("tied", [True, False])
    def test_twins_in_both_frameworks_have_the_same_roles(self, tied):
        torch = pytest.importorskip("torch")
        import benchmarks.workloads  # noqa: F401  sets the path to the demo's modules

        # isort: split
        import _gpt_torch
        import cruxy_torch
        from _demo import MODELS
        from _gpt import GPT

        config, _, _ = MODELS["small"]
        ours = GPT(config, 16, rngs=nnx.Rngs(0), tied=tied)
        with torch.device("meta"):
            theirs = _gpt_torch.GPT(config, 16)
            if not tied:
                theirs.head = torch.nn.Linear(config.width, 16, bias=False)
        want = {
            name.rpartition(".")[0]: role for name, role in cruxy_torch.label_roles(theirs).items()
        }
        found = dotted(label_roles(nnx.state(ours, nnx.Param), ours))
        assert {name.rpartition(".")[0]: role for name, role in found.items()} == want
        assert want["tokens"] == "embedding"
        assert want["positions"] == "position"

    def test_a_model_of_other_parameters_is_refused(self, net, linen_params):
        with pytest.raises(ValueError, match="model must have the parameters as attributes, got"):
            label_roles(linen_params, net)

    def test_a_rule_that_names_no_role_is_refused(self, linen_params):
        with pytest.raises(ValueError, match="the role of a rule must be one of"):
            label_roles(linen_params, rules=[("*", "attn")])


class TestPartition:
    @pytest.mark.parametrize("still", ["attention.q", "norm", "bias", "embedding"])
    def test_a_role_that_is_set_to_zero_stands_still_alone(self, linen_params, still):
        labels = label_roles(linen_params)
        roles = set(dotted(labels).values())
        parts = {role: optax.sgd(0.1) for role in roles} | {still: optax.set_to_zero()}
        tx = optax.partition(parts, labels)
        updates, _ = tx.update(ones_like(linen_params), tx.init(linen_params))
        moved = {name for name, u in dotted(updates).items() if bool(jnp.any(u != 0.0))}
        assert moved == {name for name, role in LINEN.items() if role != still}

    def test_of_a_state_of_nnx_in_its_optimizer(self, net):
        net = nnx.clone(net)
        labels = label_roles(nnx.state(net, nnx.Param), net)
        parts = {role: optax.sgd(0.1) for role in set(dotted(labels).values())}
        tx = optax.partition(parts | {"mlp.up": optax.set_to_zero()}, labels)
        before = dotted(nnx.state(net, nnx.Param))
        optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
        optimizer.update(net, jax.tree.map(jnp.ones_like, nnx.state(net, nnx.Param)))
        after = dotted(nnx.state(net, nnx.Param))
        still = {k for k in before if bool(jnp.all(before[k] == after[k]))}
        assert still == {"mlp.up_proj.kernel", "ffn.layers.0.kernel"}


MATRICES = {k for k, role in LINEN.items() if role.startswith(("attention", "mlp"))}


class TestMasks:
    def test_a_beginning_is_all_that_begins_so(self, linen_params):
        mask = dotted(role_mask(linen_params, "attention", "mlp"))
        assert {name for name, chosen in mask.items() if chosen} == MATRICES

    def test_without_parameters_it_is_a_function_of_them(self, linen_params):
        mask = role_mask("attention", "mlp")
        assert mask(linen_params) == role_mask(linen_params, "attention", "mlp")

    def test_low_bit_state_is_that_of_the_chosen_parameters(self):
        params = {
            "wte": {"embedding": jnp.ones((64, 64))},
            "mlp": {"up": {"kernel": jnp.ones((64, 64))}},
        }
        tx = cruxy_optax.quantize_state(optax.adam(1e-3), bits=8, select=role_mask("mlp"))
        mu = tx.init(params).inner_state[0].mu
        assert isinstance(mu["mlp"]["up"]["kernel"], cruxy_optax.LowBitArray)
        assert not isinstance(mu["wte"]["embedding"], cruxy_optax.LowBitArray)

    def test_decay_is_that_of_the_chosen_parameters(self, linen_params):
        tx = optax.add_decayed_weights(1.0, mask=role_mask("attention", "mlp"))
        ones = ones_like(linen_params)
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, ones), tx.init(ones), ones)
        assert {k for k, u in dotted(updates).items() if bool(jnp.any(u != 0.0))} == MATRICES

    def test_muon_takes_the_matrices_of_attention_and_mlp_alone(self):
        muon = pytest.importorskip("optax.contrib")
        if not hasattr(muon, "MuonDimensionNumbers"):
            pytest.skip("this optax has no dimension numbers for Muon")
        params = {
            "wte": {"embedding": jnp.ones((16, 8))},
            "attn": {"query": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}},
            "mlp": {"up": {"kernel": jnp.ones((8, 32))}},
            "lm_head": {"kernel": jnp.ones((8, 16))},
        }
        numbers = jax.tree.map(
            lambda m: muon.MuonDimensionNumbers() if m else None,
            role_mask(params, "attention", "mlp"),
        )
        tx = muon.muon(0.1, muon_weight_dimension_numbers=numbers)
        state = tx.init(params)
        mu = state.inner_states["muon"].inner_state[0].mu
        assert set(dotted(mu)) == {"attn.query.kernel", "mlp.up.kernel"}

    def test_a_key_that_is_no_role_lists_those_there_are(self, linen_params):
        with pytest.raises(ValueError, match=r"got 'attn'; this model has attention\.k"):
            role_mask(linen_params, "attn")

    def test_without_parameters_such_a_key_is_refused_at_once(self):
        with pytest.raises(ValueError, match=r"got 'norms'; roles are embedding, position, norm"):
            role_mask("mlp", "norms")

    def test_no_key_is_refused(self, linen_params):
        with pytest.raises(ValueError, match="needs at least one role, got none"):
            role_mask(linen_params)


RATES = {"embedding": 1 / 3, "norm": 3.0, "attention": 0.5, "attention.q": 2.0}


def by_hand(updates):
    """The same rates, written out."""

    def factor(role):
        if role in ("norm", "norm.bias"):
            return 3.0
        if role == "attention.q":
            return 2.0
        return {"embedding": 1 / 3}.get(role, 0.5 if role.startswith("attention") else 1.0)

    flat, treedef = jax.tree.flatten(updates)
    roles = [LINEN[name] for name in dotted(updates)]
    return treedef.unflatten([u * factor(role) for u, role in zip(flat, roles, strict=True)])


class TestScaleByRole:
    @pytest.mark.parametrize("jit", [True, False])
    def test_each_update_is_multiplied_by_the_longest_key(self, linen_params, jit):
        tx = scale_by_role(RATES)
        state = tx.init(linen_params)
        update = jax.jit(tx.update) if jit else tx.update
        updates, _ = update(linen_params, state, linen_params)
        assert_same(updates, by_hand(linen_params))

    def test_all_rates_1_are_the_identity(self, linen_params):
        tx = scale_by_role({"embedding": 1, "norm": 1.0})
        updates, _ = tx.update(linen_params, tx.init(linen_params))
        assert all(
            a is b
            for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(linen_params), strict=True)
        )

    def test_dtypes_stay(self):
        params = {"norm": {"scale": jnp.ones(4, jnp.bfloat16)}}
        tx = scale_by_role({"norm": jnp.float32(3.0)})
        updates, _ = tx.update(params, tx.init(params))
        assert updates["norm"]["scale"].dtype == jnp.bfloat16

    def test_behind_adamw(self, linen_params):
        adamw = optax.adamw(1e-3)
        tx = optax.chain(adamw, scale_by_role(RATES))
        updates, _ = tx.update(linen_params, tx.init(linen_params), linen_params)
        plain, _ = adamw.update(linen_params, adamw.init(linen_params), linen_params)
        assert_same(updates, by_hand(plain))

    def test_under_a_mask_every_leaf_keeps_its_role(self, linen_params):
        mask = role_mask(linen_params, "attention", "embedding")
        tx = optax.masked(scale_by_role(RATES), mask)
        updates, _ = tx.update(linen_params, tx.init(linen_params), linen_params)
        want = jax.tree.map(
            lambda m, scaled, plain: scaled if m else plain,
            mask,
            by_hand(linen_params),
            linen_params,
        )
        assert_same(updates, want)

    def test_what_stands_beside_counts_in_a_partition(self):
        params = {
            "h": {
                "self_attn": {"q_proj": {"kernel": jnp.ones((4, 4))}},
                "fc1": {"kernel": jnp.ones((4, 8))},
            }
        }
        labels = {"h": {"self_attn": {"q_proj": {"kernel": "a"}}, "fc1": {"kernel": "b"}}}
        tx = optax.partition({"a": optax.identity(), "b": scale_by_role({"mlp.up": 2.0})}, labels)
        updates, _ = tx.update(params, tx.init(params), params)
        assert float(updates["h"]["fc1"]["kernel"][0, 0]) == 2.0

    def test_gradients_that_are_missing_change_no_role_of_the_others(self):
        params = {
            "attn": {name: {"kernel": jnp.ones((4, 4))} for name in ("query", "key", "dense")}
        }
        grads = {"attn": {"query": None, "key": None, "dense": {"kernel": jnp.ones((4, 4))}}}
        tx = scale_by_role({"attention.out": 2.0})
        updates, _ = tx.update(grads, tx.init(params), params)
        assert float(updates["attn"]["dense"]["kernel"][0, 0]) == 2.0

    def test_in_inject_hyperparams(self, linen_params):
        tx = optax.inject_hyperparams(lambda rate: scale_by_role({"norm": rate}))(rate=3.0)
        state = tx.init(linen_params)
        updates, state = jax.jit(tx.update)(linen_params, state, linen_params)
        state.hyperparams["rate"] = jnp.asarray(5.0)
        again, _ = jax.jit(tx.update)(linen_params, state, linen_params)
        assert float(updates["ln_f"]["scale"][0]) == 3.0
        assert float(again["ln_f"]["scale"][0]) == 5.0

    def test_200_steps_under_self_driving_are_those_of_rates_by_hand(self, linen_params):
        params = {name: linen_params[name] for name in ("wte", "ln_f", "lm_head")}
        params["h_0"] = {"attn": {"query": linen_params["h_0"]["attn"]["query"]}}
        target = jax.tree.map(lambda x: x + 0.3, params)

        def run(scale):
            tx = cruxy_optax.stabilize(
                optax.chain(
                    cruxy_optax.clip_by_predicted_norm(),
                    cruxy_optax.scale_by_controlled_adam(),
                    scale,
                    cruxy_optax.scale_by_meta_learning_rate(1e-3, relative_limit=0.1),
                ),
                law=SelfDriving(),
            )

            def loss_fn(params):
                parts = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2), params, target)
                return sum(jax.tree.leaves(parts))

            def step(carry, _):
                params, state = carry
                loss, grads = jax.value_and_grad(loss_fn)(params)
                updates, state = tx.update(grads, state, params, value=loss)
                return (optax.apply_updates(params, updates), state), loss

            start = (params, tx.init(params))
            return jax.jit(lambda c: jax.lax.scan(step, c, length=200))(start)

        (ours, _), losses = run(scale_by_role(RATES))
        (theirs, _), _ = run(optax.stateless(lambda updates, _: by_hand(updates)))
        assert_same(ours, theirs)
        assert float(losses[-1]) < float(losses[0])

    def test_in_an_optimizer_of_nnx(self, net):
        net = nnx.clone(net)
        tx = optax.chain(optax.sgd(1.0), scale_by_role({"embedding": 0.0}))
        before = net.tokens.embedding[...].copy()
        optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
        optimizer.update(net, jax.tree.map(jnp.ones_like, nnx.state(net, nnx.Param)))
        np.testing.assert_array_equal(net.tokens.embedding[...], before)

    def test_an_unknown_key_lists_the_roles_at_init(self, linen_params):
        with pytest.raises(ValueError, match=r"keys of rates .* got 'norms'; this model has"):
            scale_by_role({"norms": 2.0}).init(linen_params)

    def test_a_rate_below_0_is_refused(self):
        with pytest.raises(ValueError, match=r"rates\['norm'\] must be in \[0, infinity\), got -1"):
            scale_by_role({"norm": -1.0})

    def test_rates_that_are_no_mapping_are_refused(self):
        with pytest.raises(TypeError, match="rates must be a mapping of roles to numbers, got 3"):
            scale_by_role(3.0)


class TestTable:
    def test_elements_and_tensors_add_up(self, linen_params):
        rows = role_table(linen_params).rows
        assert sum(row.parameters for row in rows) == sum(
            leaf.size for leaf in jax.tree.leaves(linen_params)
        )
        assert sum(row.tensors for row in rows) == len(jax.tree.leaves(linen_params))

    def test_rates_and_decays_are_those_of_the_role(self, linen_params):
        rows = {
            row.role: (row.rate, row.decay)
            for row in role_table(linen_params, rates=RATES, decays={"norm": 1, "head": 0}).rows
        }
        assert rows["attention.q"] == (2.0, 1.0)
        assert rows["norm.bias"] == (3.0, 1.0)
        assert rows["bias"] == (1.0, 0.0)
        assert rows["head"] == (1.0, 0.0)

    def test_it_prints_a_line_a_role(self, linen_params):
        table = role_table(jax.eval_shape(lambda: linen_params))
        lines = str(table).splitlines()
        assert len(lines) == 1 + len(table.rows)
        assert any(line.startswith("bias (attention.q)") for line in lines)

    def test_a_key_that_is_no_role_is_refused(self, linen_params):
        with pytest.raises(ValueError, match="keys of decays must be roles"):
            role_table(linen_params, decays={"norms": 0})


class TestSlices:
    def test_an_axis_of_their_own_tells(self):
        params = {
            "attn": {
                "qkv": {"kernel": jnp.ones((8, 3, 2, 4)), "bias": jnp.ones((3, 2, 4))},
                "kv_einsum": {"w": jnp.ones((2, 4, 8, 4))},
            }
        }
        found = qkv_slices(params)
        assert found["attn.qkv.kernel"] == blocks(1, 1, 1, axis=1)
        assert found["attn.qkv.bias"] == blocks(1, 1, 1)
        assert found["attn.kv_einsum.w"] == blocks(0, 1, 1)

    def test_they_cut_what_linen_computes(self):
        layer = linen.DenseGeneral((3, 2, 4), name="qkv")
        x = jax.random.normal(jax.random.key(1), (5, 8))
        params = layer.init(jax.random.key(0), x)["params"]
        (name,) = [n for n in qkv_slices({"attn": {"qkv": params}}) if n.endswith("kernel")]
        where = qkv_slices({"attn": {"qkv": params}})[name]
        start, stop = where.k[0]
        kernel = jax.lax.slice_in_dim(params["kernel"], start, stop, axis=where.axis)[:, 0]
        k = jnp.einsum("bd,dhs->bhs", x, kernel) + params["bias"][1]
        np.testing.assert_allclose(layer.apply({"params": params}, x)[:, 1], k, rtol=1e-5)

    def test_a_flat_kernel_needs_a_word(self):
        params = {"attn": {"c_attn": {"kernel": jnp.ones((8, 24))}}}
        with pytest.raises(ValueError, match=r"attn\.c_attn\.kernel \(shape \(8, 24\)\)"):
            qkv_slices(params)
        by_hand = {"*.kernel": blocks(8, 8, 8, axis=1)}
        assert qkv_slices(params, slices=by_hand) == {"attn.c_attn.kernel": by_hand["*.kernel"]}

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("qkv.kernel", (16, 3, 12)),  # three heads, each with its q, k and v
            ("qkv.kernel", (3, 16, 48)),  # three layers
            ("qkv.kernel", (3, 16, 4, 36)),
            ("qkv.kernel", (16, 3, 3, 4)),
            ("qkv.kernel", (16, 4, 3, 12)),
            ("qkv_einsum.w", (4, 3, 16, 12)),
            ("kv.kernel", (16, 2, 24)),  # two heads, each with its k and v
            ("kv.kernel", (2, 16, 4, 24)),
            ("qkv.bias", (3, 12)),
        ],
    )
    def test_heads_and_layers_are_not_taken_for_q_k_and_v(self, name, shape):
        layer, leaf = name.split(".")
        layers = {"kernel": jnp.ones((16, 3, 12))} if leaf == "bias" else {}
        params = {"attn": {layer: layers | {leaf: jnp.ones(shape)}}}
        given = {"*.kernel": blocks(4, 4, 4, axis=2)} if layers else None
        with pytest.raises(ValueError, match=rf"must be known of attn\.{name} .* of heads and"):
            qkv_slices(params, slices=given)

    def test_layers_that_are_stacked_have_their_axis_before(self):
        params = {
            "attn": {
                "qkv": {"kernel": jnp.ones((5, 8, 3, 2, 4)), "bias": jnp.ones((5, 3, 2, 4))},
                "qkv_einsum": {"w": jnp.ones((5, 3, 2, 8, 4))},
            }
        }
        assert {name: found.axis for name, found in qkv_slices(params).items()} == {
            "attn.qkv.kernel": 2,
            "attn.qkv.bias": 1,
            "attn.qkv_einsum.w": 1,
        }
