"""The roles of parameters without a framework: what tells a role, and what does not."""

import random
import re
import string

import pytest

from cruxy_control import _role_names as names
from cruxy_control.roles import (
    ROLES,
    Label,
    Parameter,
    check_keys,
    check_rules,
    is_decayed,
    label,
    matching,
    own_index,
)


def role(path, shape=(8, 8), **known):
    """What a dotted path is labelled, with what is known beside it."""
    siblings = frozenset(known.pop("siblings", "").split())
    return label(Parameter(tuple(path.split(".")), shape, siblings=siblings, **known)).role


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        # The same name means different things inside an attention and inside an MLP.
        ("h.0.attn.c_proj.weight", "attention.out"),
        ("h.0.mlp.c_proj.weight", "mlp.down"),
        ("block.0.SelfAttention.wo.weight", "attention.out"),
        ("block.0.DenseReluDense.wo.weight", "mlp.down"),
        # `value` is BERT's module, and what nnx calls what a variable holds.
        ("attention.self.value.weight", "attention.v"),
        ("attention.query.kernel.value", "attention.q"),
        # A layer's name beyond the nearest list says nothing.
        ("attention_encoder.layer.0.output.dense.weight", "mlp.down"),
        ("mlp_tower.layer.0.attention.output.dense.weight", "attention.out"),
        # Names that stripping or a part of a name would mistake.
        ("attn.in_proj_weight", "attention.qkv"),
        ("encoder.qkvish.weight", "matrix"),
        ("block.attn.cpb_mlp.0.weight", "matrix"),
        ("altup.modality_router.weight", "matrix"),
        ("gatekeeper.weight", "matrix"),
    ],
)
def test_a_name_is_read_where_it_stands(path, expected):
    assert role(path, kind="linear") == expected


@pytest.mark.parametrize(
    ("path", "siblings", "expected"),
    [
        ("layers.0.fc1.weight", "self_attn fc1 fc2", "mlp.up"),
        ("layers.0.fc1.weight", "conv1 fc1 fc2", "matrix"),
        ("layers.0.linear2.weight", "self_attn linear1 linear2", "mlp.down"),
        ("head.fc2.weight", "attn fc1 fc2 fc3", "matrix"),
        ("x.q_proj.weight", "q_proj k_proj", "attention.q"),
        ("x.q_proj.weight", "q_proj", "matrix"),
        ("x.up_proj.weight", "gate_proj up_proj down_proj", "mlp.up"),
        ("x.up_proj.weight", "up_proj down_proj", "matrix"),  # an adapter begins with down
        ("mlp.w1.weight", "w1 w2 w3", "mlp.gate"),
        ("mlp.w1.weight", "w1 w2", "mlp.up"),
        ("mlp.w3.weight", "w12 w3", "mlp.down"),
        ("mlp.gate.weight", "gate experts", "moe.router"),
        ("mlp.gate.weight", "gate up down", "mlp.gate"),
        ("mixer.in_proj.weight", "in_proj out_proj A_log D", "ssm.in"),
        ("mixer.in_proj.weight", "in_proj out_proj", "matrix"),
        ("attention.c_attn.weight", "c_attn q_attn", "attention.kv"),
        ("bottleneck.attention.dense.weight", "dense LayerNorm", "matrix"),
        ("attention.dense.weight", "query key value dense", "attention.out"),
    ],
)
def test_what_stands_beside_tells(path, siblings, expected):
    assert role(path, kind="linear", siblings=siblings) == expected


@pytest.mark.parametrize(
    ("path", "shape", "kind", "expected"),
    [
        ("a.weight", (8,), "norm", Label("norm", None, "class")),
        ("a.bias", (8,), "norm", Label("norm.bias", None, "class")),
        ("a.bias", (8,), "linear", Label("bias", "matrix", "name")),
        ("attn.q_proj.bias", (8,), "linear", Label("bias", "attention.q", "name")),
        ("attn.q_bias", (8,), "", Label("bias", "attention.q", "name")),
        ("experts.gate_up_proj_bias", (4, 8), "", Label("bias", "moe.expert.gate_up", "name")),
        ("attn.relative_bias.weight", (8, 2), "embedding", Label("position", None, "class")),
        ("attn.relative_position_bias_table", (8, 2), "", Label("position", None, "name")),
        ("pos_emb.token_emb.weight", (8, 2), "embedding", Label("embedding", None, "class")),
        ("embed_positions.pe_k.weight", (8, 2), "embedding", Label("position", None, "class")),
        ("pos_conv_embed.conv.weight", (8, 2, 3), "conv", Label("conv", None, "class")),
        ("pos_proj.weight", (8, 8), "linear", Label("matrix", None, "shape")),
        ("embed_project.weight", (8, 8), "linear", Label("matrix", None, "shape")),
        ("ls1.gamma", (8,), "", Label("vector", None, "shape")),
        ("layer_scale.scale", (8,), "", Label("vector", None, "shape")),
        ("ln.scale", (8,), "", Label("norm", None, "name")),
        ("mlp.gate.router_scale", (8,), "", Label("vector", None, "shape")),
        ("attn.temperature", (4, 1, 1), "", Label("vector", None, "shape")),
        ("conv.kernel", (3, 3, 8, 8), "", Label("conv", None, "shape")),
    ],
)  # fmt: skip
def test_class_and_shape_tell(path, shape, kind, expected):
    assert label(Parameter(tuple(path.split(".")), shape, kind=kind)) == expected


@pytest.mark.parametrize("cls", ["LlamaRMSNorm", "LayerNorm", "BatchNorm2d", "MambaRMSNormGated"])
def test_a_class_tells_a_norm(cls):
    assert role("a.weight", (8,), owners=("Net", cls)) == "norm"


@pytest.mark.parametrize("cls", ["LayerNormLinear", "NormedLinear", "PreNormBlock"])
@pytest.mark.parametrize("leaf", ["weight", "w"])
def test_a_class_that_does_more_than_a_norm_owns_none(cls, leaf):
    assert role(f"a.{leaf}", (24, 8), owners=("Net", cls)) == "matrix"


def test_the_bias_of_a_head_that_normalises_first_is_no_norms():
    owners = ("RobertaPreLayerNormForMaskedLM", "RobertaPreLayerNormLMHead")
    found = label(Parameter(("lm_head", "bias"), (8,), owners))
    assert found == Label("bias", "head", "name")


def test_a_norm_over_heads_has_a_matrix():
    assert role("attn.q_norm.weight", (4, 8), owners=("Net", "Attention", "RMSNorm")) == "norm"


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding", "attention"])
@pytest.mark.parametrize(
    ("leaf", "shape"), [("scale", (4,)), ("gamma", (4,)), ("gain", (4, 1, 1, 1)), ("alpha", (1,))]
)
def test_what_a_layer_has_beside_its_weight_is_a_vector(kind, leaf, shape):
    assert role(f"attn.q_proj.{leaf}", shape, kind=kind) == "vector"


@pytest.mark.parametrize("leaf", ["gamma", "scale", "weight"])
def test_a_vector_that_no_known_layer_owns_is_no_matrix_of_a_part(leaf):
    assert role(f"attn.out.{leaf}", (4,), owners=("Net", "Attention", "Scaled")) == "vector"


@pytest.mark.parametrize("leaf", ["x_proj_weight", "dt_proj_weight"])
def test_mambas_bare_weights_are_known_beside_their_matrix(leaf):
    beside = f"{leaf} A_log D"
    assert role(f"mamba.{leaf}", siblings=beside) == f"ssm.{leaf.split('_')[0]}"


def test_a_stacked_b_beside_w_is_a_bias():
    path, shape = ("mlp", "up", "b"), (12, 32)
    found = label(Parameter(path, shape, owned=frozenset("wb")))
    assert found == Label("bias", "mlp.up", "name")


def test_the_rows_of_trainable_tokens_are_an_embedding():
    path = "embed.token_adapter.trainable_tokens_delta.default"
    assert role(path, owners=("Net",) * 3) == "embedding"


@pytest.mark.parametrize("cls", ["NormalizedLinear", "Linear", "Conv1D"])
def test_a_class_that_only_begins_like_a_norm_or_a_convolution_does_not(cls):
    assert role("a.weight", owners=("Net", cls)) == "matrix"


@pytest.mark.parametrize(
    "path",
    [
        "layers.0.fc1.base_layer.weight",
        "module.layers.0._fsdp_wrapped_module.fc1._checkpoint_wrapped_module.weight",
        "_orig_mod.layers.0.fc1.parametrizations.weight.original",
        "layers.0.fc1.parametrizations.weight.original1",
        "base_model.model.layers.0.fc1.modules_to_save.default.weight",
        "base_model.model.layers.0.fc1.original_module.weight",
    ],
)
def test_wrappers_are_passed_through(path):
    assert role(path, kind="linear", siblings="self_attn fc1 fc2") == "mlp.up"
    assert path.split(".")[own_index(tuple(path.split(".")))] == "fc1"


def test_the_length_of_a_normed_weight_is_a_vector():
    path = "layers.0.fc1.parametrizations.weight.original0"
    assert role(path, (8, 1), kind="linear", siblings="self_attn fc1 fc2") == "vector"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("attn.q_proj.lora_A.default.weight", Label("lora.a", "attention.q", "name")),
        ("attn.q_proj.lora_B.other.weight", Label("lora.b", "attention.q", "name")),
        ("attn.q_proj.lora_B.default.bias", Label("bias", "lora.b", "name")),
        ("mlp.fc1.lora_magnitude_vector.default.weight", Label("lora.scale", "mlp.up", "name")),
        ("wte.lora_embedding_A.default", Label("lora.a", "embedding", "name")),
        ("attn.query.lora_b", Label("lora.b", "attention.q", "name")),
        ("attn.q_proj.lora_E.default", Label("lora.scale", "attention.q", "name")),
        ("lm_head.lora_A.default.weight", Label("lora.a", "head", "name")),
    ],
)
def test_adapters_belong_to_what_they_adapt(path, expected):
    assert label(Parameter(tuple(path.split(".")), (8, 2))) == expected


class TestRules:
    def test_a_rule_comes_first(self):
        parameter = Parameter(("attn", "adapter", "q_proj", "weight"), (8, 8))
        assert label(parameter, [("*.adapter.*", "head")]) == Label("head", None, "rule")

    def test_the_first_rule_that_matches_counts(self):
        rules = [("b.*", "head"), ("a.*", "conv"), ("*", "embedding")]
        assert label(Parameter(("a", "weight"), (8, 8)), rules).role == "conv"

    def test_a_function_is_given_the_name_and_the_parameter(self):
        rules = [(lambda name, parameter: name == "a.weight" and parameter.shape[0] > 4, "head")]
        assert label(Parameter(("a", "weight"), (8, 8)), rules).role == "head"
        assert label(Parameter(("a", "weight"), (4, 8)), rules).role == "matrix"

    def test_a_role_that_is_none_is_refused(self):
        with pytest.raises(ValueError, match=r"must be one of embedding, .* got 'adapter'"):
            check_rules([("*.adapter.*", "adapter")])

    @pytest.mark.parametrize("rule", ["*", ("*",), (3, "head"), ("*", "head", 1)])
    def test_what_is_no_pair_is_refused(self, rule):
        with pytest.raises(TypeError, match="must be a pair"):
            check_rules([rule])


class TestKeys:
    def test_the_longest_key_wins(self):
        table = {"attention": 1, "attention.q": 2, "attention.q.b": 3}
        found = {
            r: matching(table, r, 0) for r in ("attention.q.b", "attention.q.a", "attention.v")
        }
        assert found == {"attention.q.b": 3, "attention.q.a": 2, "attention.v": 1}

    def test_a_key_matches_whole_words(self):
        assert matching({"mlp.gate": 2}, "mlp.gate_up", 1) == 1

    def test_a_role_that_no_parameter_has_may_be_named(self):
        check_keys("rates", ["lora.b", "moe", "moe.expert", "attention.q"], ["embedding"])

    @pytest.mark.parametrize("key", ["lora.c", "attn", "", "attention.", "mlp.gate.up", "gate"])
    def test_an_unknown_key_is_refused_with_the_roles_that_are_there(self, key):
        with pytest.raises(ValueError, match=f"{key!r}; this model has head, norm"):
            check_keys("rates", [key], ["norm", "head", "norm"])


@pytest.mark.parametrize("name", [*ROLES])
def test_what_is_decayed(name):
    parameter = Parameter(("x",), (8, 8), kind="linear")
    not_decayed = "norm norm.bias bias position vector lora.scale ssm.a ssm.d".split()
    assert is_decayed(Label(name, None, "name"), parameter) == (name not in not_decayed)


def test_a_matrix_that_no_layer_owns_is_not_decayed():
    assert not is_decayed(Label("matrix", None, "shape"), Parameter(("a", "A_log"), (8, 8)))


@pytest.mark.parametrize(
    ("path", "shape", "decayed"),
    [
        ("a.weight", (8, 8), True),
        ("experts.w", (4, 8, 8), True),
        ("a.parametrizations.weight.original", (8, 8), True),
        ("a.weight", (1, 8), False),
        ("norm.w", (12, 8), False),  # of stacked layers
        ("q_proj.hada_w1_a.default", (8, 2), True),
        ("a.table", (8, 8), False),
    ],
)
def test_a_matrix_of_an_unknown_layer_is_decayed_where_it_is_its_weight(path, shape, decayed):
    parameter = Parameter(tuple(path.split(".")), shape)
    assert is_decayed(Label("matrix", None, "shape"), parameter) == decayed


WORDS = {
    *names.ATTENTION,
    *names.MLP,
    *names.SSM,
    *names.BESIDE_ATTENTION,
    *names.HEADS,
    *names.INSIDE_A_HEAD,
    *names.TOKENS,
    *(word for value in vars(names).values() if isinstance(value, frozenset) for word in value),
}


def test_only_the_words_of_the_tables_give_a_role():
    chance = random.Random(0)
    letters = string.ascii_letters + string.digits + "__"

    def name():
        while True:
            text = "".join(chance.choices(letters, k=chance.randint(1, 10)))
            parts = {
                text.lower(),
                re.sub(r"_?(weight|bias)$", "", text.lower()),
                *names.words(text),
            }
            if not parts & WORDS and not text.isdigit() and not names.LORA.match(text):
                return text

    for _ in range(3000):
        path = [name() for _ in range(chance.randint(1, 5))]
        beside = frozenset(name() for _ in range(3))
        leaf = chance.choice(["weight", "kernel", "w", name()])
        shape = chance.choice([(8,), (8, 8), (8, 8, 8)])
        kind = chance.choice(["", "linear"])
        found = label(Parameter((*path, leaf), shape, kind=kind, siblings=beside))
        assert found.role in ("vector", "matrix"), (path, leaf, found)
