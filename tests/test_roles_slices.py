"""Where q, k and v lie in fused tensors: what models compute equals the input times our slices."""

import pytest
import torch
from torch import nn

from cruxy_control.slices import Slices, blocks, check_slices, per_group, per_head, repeated
from cruxy_torch import build_tagged_param_groups, qkv_slices

pytest.importorskip("transformers")

import transformers

from role_models import GPT, GROUPED, SMALL

NONE = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def test_groups_alternate():
    assert per_group(2, 2, 3) == Slices(
        0, q=((0, 6), (12, 18)), k=((6, 9), (18, 21)), v=((9, 12), (21, 24))
    )


def test_heads_alternate():
    assert per_head(2, 4, axis=1).k == ((4, 8), (16, 20))


def test_a_part_that_is_not_there_has_no_ranges():
    assert blocks(0, 4, 4) == Slices(0, q=(), k=((0, 4),), v=((4, 8),))


def test_order_is_free():
    assert repeated(1, 2, 3, order="qvk") == Slices(0, q=((0, 1),), k=((4, 6),), v=((1, 4),))


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        (blocks(8, 4, 4), r"axis 0 of w .* 8 \+ 4 \+ 4 = 16 indices for a size of 24"),
        (Slices(0, q=((0, 9),), k=((8, 16),), v=((16, 24),)), "gap or overlap"),
        (Slices(0, q=((0, 8),), k=((8, 16),), v=((17, 24),)), "gap or overlap"),
        (blocks(8, 8, 8, axis=2), "axis 2 of shape"),
    ],
)
def test_slices_that_do_not_fill_a_tensor_are_refused(slices, message):
    with pytest.raises(ValueError, match=message):
        check_slices("w", slices, (24, 8))


@pytest.mark.parametrize("options", [{"q": -1}, {"times": 0}, {"order": "qkk"}, {"k": 1.5}])
def test_blocks_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        repeated(**{"q": 1, "k": 1, "v": 1, **options})


def seen_by(model):
    """The arguments q, k and v of the attention function that the first layer calls, and its x."""
    seen = {}

    def attention(module, query, key, value, *args, **kwargs):
        if "q" not in seen:
            seen.update(q=query, k=key, v=value)
        groups = query.shape[1] // key.shape[1]
        value = value.repeat_interleave(groups, 1) if value.ndim == 4 else value[:, None]
        return value.expand(query.shape).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("captured", attention)
    model.config._attn_implementation = "captured"
    return seen


def small(name, config, **options):
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**{**options, **NONE}))
    with torch.no_grad():  # biases begin at 0 in some, which would hide where they are taken from
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.1)
    return model.eval()


FUSED = {
    "gpt2": ("GPT2Model", "GPT2Config", GPT, "h.0.attn.c_attn"),
    "imagegpt": ("ImageGPTModel", "ImageGPTConfig", GPT, "h.0.attn.c_attn"),
    "gpt_bigcode": ("GPTBigCodeModel", "GPTBigCodeConfig", GPT, "h.0.attn.c_attn"),
    "gpt_bigcode heads": (
        "GPTBigCodeModel",
        "GPTBigCodeConfig",
        {**GPT, "multi_query": False},
        "h.0.attn.c_attn",
    ),
    "phi3": ("Phi3Model", "Phi3Config", GROUPED, "layers.0.self_attn.qkv_proj"),
    "gpt_neox": ("GPTNeoXModel", "GPTNeoXConfig", SMALL, "layers.0.attention.query_key_value"),
    "bloom": (
        "BloomModel",
        "BloomConfig",
        {"vocab_size": 96, "hidden_size": 32, "n_layer": 1, "n_head": 4},
        "h.0.self_attention.query_key_value",
    ),
    "falcon": (
        "FalconModel",
        "FalconConfig",
        {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
        "h.0.self_attention.query_key_value",
    ),
    "falcon one key": (
        "FalconModel",
        "FalconConfig",
        {**SMALL, "multi_query": True},
        "h.0.self_attention.query_key_value",
    ),
    "falcon heads": (
        "FalconModel",
        "FalconConfig",
        {**SMALL, "multi_query": False},
        "h.0.self_attention.query_key_value",
    ),
    "codegen": (
        "CodeGenModel",
        "CodeGenConfig",
        {**GPT, "rotary_dim": 4},
        "h.0.attn.qkv_proj",
    ),
    "mpt": (
        "MptModel",
        "MptConfig",
        {"vocab_size": 96, "d_model": 32, "n_layers": 1, "n_heads": 4},
        "blocks.0.attn.Wqkv",
    ),
    "persimmon": (
        "PersimmonModel",
        "PersimmonConfig",
        {**SMALL, "qk_layernorm": False},
        "layers.0.self_attn.query_key_value",
    ),
    "dbrx": (
        "DbrxModel",
        "DbrxConfig",
        {
            "vocab_size": 96,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 1,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 1e6},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 2, "moe_top_k": 1},
        },
        "blocks.0.norm_attn_norm.attn.Wqkv",
    ),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        {**SMALL, "attention_bias": True},
        "layers.0.attn.Wqkv",
    ),
}
"""A model, its config, the config's options, and its fused layer."""


def parts(x, layer, slices, biases):
    """The input times our slices of the weight, and those of the bias added."""
    result = {}
    for name, ranges in slices.parts():
        columns = []
        for start, stop in ranges:
            weight = layer.weight.narrow(slices.axis, start, stop - start)
            columns.append(x @ (weight if slices.axis == 1 else weight.T))
        result[name] = torch.cat(columns, -1)
        if layer.bias is not None:
            result[name] += torch.cat([layer.bias[a:b] for a, b in dict(biases.parts())[name]])
    return result


@pytest.mark.parametrize(
    "family",
    ["gpt2", "gpt_bigcode", "gpt_bigcode heads", "phi3", "gpt_neox", "modernbert"],
)
def test_an_attention_function_is_given_the_input_times_our_slices(family):
    model_name, config, options, name = FUSED[family]
    model = small(model_name, config, **options)
    seen = seen_by(model)
    layer = model.get_submodule(name)
    layer.register_forward_pre_hook(lambda _, args: seen.setdefault("x", args[0]))
    # At position 0 nothing is rotated.
    model(torch.arange(6)[None], position_ids=torch.zeros(1, 6, dtype=torch.long))
    slices = qkv_slices(model)
    ours = parts(seen["x"], layer, slices[f"{name}.weight"], slices.get(f"{name}.bias"))
    for part, value in ours.items():
        theirs = seen[part]
        theirs = theirs.transpose(1, 2).flatten(2) if theirs.ndim == 4 else theirs
        torch.testing.assert_close(value, theirs.reshape(value.shape))


SPLITS = {"bloom": "_reshape", "falcon": "_split_heads", "persimmon": "_split_heads"}
"""The methods that cut what has been computed, where there is no attention function to replace."""


@pytest.mark.parametrize(
    "family", ["bloom", "falcon", "falcon one key", "falcon heads", "persimmon"]
)
def test_a_model_cuts_what_it_computes_as_our_slices_do(family):
    model_name, config, options, name = FUSED[family]
    model, seen = small(model_name, config, **options), {}
    layer, attention = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    cut = SPLITS[family.split()[0]]
    original = getattr(attention, cut)

    def capture(fused):
        seen["q"], seen["k"], seen["v"] = original(fused)
        return seen["q"], seen["k"], seen["v"]

    setattr(attention, cut, capture)
    layer.register_forward_pre_hook(lambda _, args: seen.setdefault("x", args[0]))
    model(torch.arange(6)[None])
    slices = qkv_slices(model)
    ours = parts(seen["x"], layer, slices[f"{name}.weight"], slices.get(f"{name}.bias"))
    for part, value in ours.items():
        theirs = seen[part]  # heads stand before or behind the positions
        theirs = theirs.transpose(1, 2) if family == "bloom" else theirs
        heads = value.shape[-1] // theirs.shape[-1]
        theirs = theirs[:, :, :: theirs.shape[2] // heads]  # those of a group are the same
        torch.testing.assert_close(value, theirs.flatten(2))


@pytest.mark.parametrize("family", FUSED)
def test_queries_may_grow_by_what_keys_shrink(family):
    model_name, config, options, name = FUSED[family]
    model = small(model_name, config, **options)
    inputs = torch.arange(6)[None]
    before = model(inputs).last_hidden_state
    with torch.no_grad():
        for part in ("weight", "bias"):
            slices = qkv_slices(model).get(f"{name}.{part}")
            tensor = getattr(model.get_submodule(name), part)
            for factor, ranges in () if slices is None else ((4.0, slices.q), (0.25, slices.k)):
                for start, stop in ranges:
                    tensor.narrow(slices.axis, start, stop - start).mul_(factor)
    torch.testing.assert_close(model(inputs).last_hidden_state, before)


@pytest.mark.parametrize("family", ["codegen", "mpt", "dbrx"])
def test_without_its_values_an_attention_gives_nothing(family):
    model_name, config, options, name = FUSED[family]
    model, outputs = small(model_name, config, **options), []
    slices = qkv_slices(model)[f"{name}.weight"]
    with torch.no_grad():
        for start, stop in slices.v:
            model.get_submodule(name).weight[start:stop] = 0.0
    attention = model.get_submodule(name.rpartition(".")[0])
    attention.out_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    model(torch.arange(6)[None])
    assert outputs[0].abs().max() == 0.0


def test_in_proj_of_torch_is_three_blocks():
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(1, 3, 8)
    slices = qkv_slices(attention)["in_proj_weight"]
    before = attention(x, x, x)[0]
    with torch.no_grad():
        for factor, ranges in ((4.0, slices.q), (0.25, slices.k)):
            for start, stop in ranges:
                attention.in_proj_weight[start:stop] *= factor
                attention.in_proj_bias[start:stop] *= factor
    torch.testing.assert_close(attention(x, x, x)[0], before)


def test_keys_and_values_for_another_sequence_have_no_queries():
    config = transformers.GPT2Config(**GPT, add_cross_attention=True)
    with torch.device("meta"):
        model = transformers.GPT2Model(config)
    assert qkv_slices(model)["h.0.crossattention.c_attn.weight"] == blocks(0, 32, 32, axis=1)


class Own(nn.Module):
    """An attention that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)


def test_three_equal_chunks_are_not_guessed():
    with pytest.raises(ValueError, match=r"known of qkv.weight .*slices="):
        qkv_slices(Own())


def test_slices_given_by_hand_come_first():
    by_hand = per_head(2, 4)
    assert qkv_slices(Own(), slices={"*qkv.*": by_hand})["qkv.bias"] == by_hand


def test_slices_given_by_hand_have_to_fill_the_tensor():
    with pytest.raises(ValueError, match="8 \\+ 8 \\+ 4 = 20 indices for a size of 24"):
        qkv_slices(Own(), slices={"*": blocks(8, 8, 4)})


def test_what_is_given_by_hand_has_to_be_slices():
    with pytest.raises(TypeError, match="must be a Slices"):
        qkv_slices(Own(), slices={"*": (8, 8, 8)})


def test_rows_that_do_not_add_up_are_refused():
    model = small("Phi3Model", "Phi3Config", **GROUPED)
    model.layers[0].self_attn.num_key_value_heads = 4
    with pytest.raises(ValueError, match=r"32 \+ 32 \+ 32 = 96 indices for a size of 64"):
        qkv_slices(model)


def test_a_parametrized_weight_of_gpt2_keeps_its_axis():
    model = small("GPT2Model", "GPT2Config", **GPT)
    nn.utils.parametrize.register_parametrization(model.h[0].attn.c_attn, "weight", nn.Identity())
    found = qkv_slices(model)
    assert found["h.0.attn.c_attn.parametrizations.weight.original"] == blocks(32, 32, 32, axis=1)
    assert found["h.0.attn.c_attn.bias"] == blocks(32, 32, 32)


def test_what_is_frozen_needs_no_layout_in_groups():
    model = Own()
    model.qkv.requires_grad_(False)
    groups = build_tagged_param_groups(model, enable_qkv_slicing=True)
    assert [name for group in groups for name in group["param_names"]] == [
        "proj.weight",
        "proj.bias",
    ]


def test_groups_that_slices_part_have_a_rate_of_their_own_each():
    layers = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(16, 2)])
    lr = torch.tensor(0.5)
    groups = build_tagged_param_groups(layers, base_lr=lr, enable_qkv_slicing=True)
    assert sum("slices" in group for group in groups) == 2
    assert len({id(group["lr"]) for group in groups} | {id(lr)}) == len(groups) + 1
