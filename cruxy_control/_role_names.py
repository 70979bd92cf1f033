"""The words that say what a parameter is: the tables behind `roles`.

Only these words give a role. Names are compared whole and in lower case, never by a part of them.
"""

import re
from collections.abc import Mapping


def _table(roles: Mapping[str, str]) -> dict[str, str]:
    return {name: role for role, names in roles.items() for name in names.split()}


ATTENTION = _table(
    {
        "attention.q": "q q_proj q_lin q_linear q_attn query query_proj query_layer query_dense wq "
        "to_q linear_q q_head query_global q_einsum",
        "attention.k": "k k_proj k_lin k_linear key key_proj key_layer wk to_k linear_k k_head "
        "key_global",
        "attention.v": "v v_proj v_lin v_linear value value_proj value_layer wv to_v linear_v "
        "v_head value_global",
        "attention.qkv": "qkv qkv_proj qkv_linear query_key_value c_attn in_proj wqkv to_qkv "
        "attention_in qkv_einsum",
        "attention.kv": "kv kv_proj key_value wkv to_kv kv_einsum",
        "attention.out": "o o_proj out out_proj out_lin out_linear output wo c_proj dense proj "
        "to_out linear_out attention_out attn_out post_proj attn_vec_einsum",
        "attention.q.a": "q_a_proj wq_a",
        "attention.q.b": "q_b_proj wq_b",
        "attention.kv.a": "kv_a_proj kv_a_proj_with_mqa wkv_a",
        "attention.kv.b": "kv_b_proj wkv_b",
    }
)
"""Inside what says attention."""

FUSED = frozenset("in_proj_weight query_key_value c_attn qkv qkv_proj wqkv".split())
"""Names that make what they stand beside an attention."""

GENERAL = frozenset("dense output out proj".split())
"""Names of `ATTENTION` that are an attention's output only beside its q, k and v."""

MLP = _table(
    {
        "mlp.gate": "gate gate_proj wi_0 linear_gate",
        "mlp.up": "up up_proj w1 w3 v1 wi wi_1 fc1 fc_in c_fc lin1 linear1 linear_fc1 "
        "linear_1 layer_1 dense1 dense_h_to_4h intermediate_dense mlp_in w_in",
        "mlp.gate_up": "gate_up gate_up_proj gate_and_up_proj w12 gating_einsum",
        "mlp.down": "down down_proj w2 wo fc2 fc_out c_proj lin2 linear2 linear_fc2 "
        "linear_2 layer_2 dense2 dense_4h_to_h output_dense mlp_out w_out",
    }
)
"""Inside what says MLP, but for `dense` and the three names of `w1`, which need what is beside."""

JOINED = {
    "attention_in": "attention.qkv",
    "attention_out": "attention.out",
    "mlp_in": "mlp.up",
    "mlp_out": "mlp.down",
}
"""Layers that say themselves which part they are, all four of a block beside each other."""

BESIDE_ATTENTION = _table(
    {"mlp.up": "fc1 fc_in linear1 lin1 ffn", "mlp.down": "fc2 fc_out linear2 lin2 ffn_output"}
)
"""Straight in a layer that holds an attention too."""

SSM = _table(
    {
        "ssm.in": "in_proj in_proj_qkv in_proj_qkvz",
        "ssm.x": "x_proj",
        "ssm.dt": "dt_proj",
        "ssm.out": "out_proj",
        "ssm.a": "a_log",
        "ssm.d": "d",
    }
)
"""Beside a parameter `A_log`."""

HEADS = frozenset(
    "lm_head head classifier score qa_outputs embed_out classification_head unembed".split()
)
INSIDE_A_HEAD = frozenset("fc out_proj decoder".split())
CHAINS = frozenset("net layers layer seq sequential".split())
"""Names of a chain of layers that leave it to what stands around to say what it is."""

LAST = frozenset("fc linear lin dense layer out output decoder l".split())
"""Names, but for a number behind them, of a last layer that is a head."""

TOKENS = frozenset(
    "cls_token class_token class_embedding mask_token dist_token distillation_token reg_token "
    "reg_tokens register_tokens mask_emb masked_spec_embed".split()
)
"""Learned vectors that stand at a place of their own in a sequence, or for what is hidden there."""

_ATTENTION_WORDS = frozenset(
    "attn attns att attention attentions mha selfattn selfattention crossattn crossattention "
    "multiheadattention".split()
)
_MLP_WORDS = frozenset("mlp mlps ffn ffns ff feedforward intermediate".split())
_POSITION_WORDS = frozenset("pos position positions positional relpos pe wpe rope rotary".split())
_EMBEDDING_WORDS = frozenset("embed embedding embeddings emb wte".split())
_CHAIN_WORDS = _MLP_WORDS | {"feed", "forward", "expert", "experts"}
_ROUTER_WORDS = frozenset("router moe expert experts token mlp gate".split())
_NORM_WORDS = frozenset("norm layernorm rmsnorm batchnorm groupnorm ln bn".split())
_MORE_THAN_NORM = frozenset(
    "head classifier linear dense proj projection conv convolution embed embedding embeddings "
    "attention attn mlp ffn feed block model encoder decoder transformer network net".split()
)

LEAVES = frozenset("weight kernel bias embedding scale w b weight_g weight_v gamma beta".split())
"""Names of parameters that leave it to their owner to say what they are."""

WEIGHTS = frozenset("weight kernel w embedding weight_g weight_v".split())
"""Those of `LEAVES` that are what their owner is for."""

SCALES = frozenset("scale gamma".split())
"""Those that are a vector beside a weight, or a norm's weight."""

TRANSPARENT = frozenset(
    "base_layer base_module original_module module _orig_mod _fsdp_wrapped_module "
    "_checkpoint_wrapped_module".split()
)
LORA = re.compile(
    r"lora_(?:embedding_)?(?:(?P<side>[AaBb])|(?P<scale>E|magnitude_vector|magnitude))$"
)

FACTORS = re.compile(r"(hada|lokr)_[wt]")
"""How PEFT's LoHa and LoKr begin the names of the factors of what they add to a weight."""


def words(name: str) -> list[str]:
    """The words of a name in lower case, without numbers: `EncDecAttention_0` has three."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).split("_")
    return [word for part in parts if (word := part.rstrip("0123456789").lower())]


def says(name: str, cls: str = "") -> str:
    """What a name, or else a class, says is inside: `"attention"`, `"mlp"` or nothing."""
    parts = words(name)
    if not _ATTENTION_WORDS.isdisjoint(parts):
        return "attention"
    glued = "".join(parts)
    if not _MLP_WORDS.isdisjoint(parts) or glued in ("feedforward", "densereludense"):
        return "mlp"
    if "Attention" in cls or "Attn" in cls:
        return "attention"
    return "mlp" if re.search("MLP|Mlp|FeedForward|FFN", cls) else ""


def is_chain(name: str) -> bool:
    """Whether a chain of layers by this name is an MLP or an expert."""
    return bool(name) and _CHAIN_WORDS.issuperset(words(name))


def says_experts(name: str, cls: str = "") -> bool:
    """Whether it holds experts of which a router chooses; shared ones see every token."""
    parts = words(name)
    if "shared" in parts:
        return False
    return "experts" in parts or "expert" in parts or "Experts" in cls


def says_router(name: str, cls: str = "") -> bool:
    """Whether it chooses experts."""
    parts = set(words(name))
    return ("router" in parts and parts <= _ROUTER_WORDS) or "Router" in cls


def says_position(name: str, cls: str = "") -> bool:
    """Whether it tells places: an embedding of positions, or a table of relative ones."""
    parts = words(name)
    placed = not {"rel", "relative", "time", "temporal"}.isdisjoint(parts)
    return (
        not _POSITION_WORDS.isdisjoint(parts)
        or (placed and not (_EMBEDDING_WORDS | {"bias"}).isdisjoint(parts))
        or "Position" in cls
    )


def says_embedding(name: str, cls: str = "") -> bool:
    """Whether it is looked up."""
    return not _EMBEDDING_WORDS.isdisjoint(words(name)) or bool(re.search(r"Embed(ding)?s?$", cls))


def says_norm(name: str) -> bool:
    """Whether it normalises."""
    return not _NORM_WORDS.isdisjoint(words(name))


def is_norm(cls: str) -> bool:
    """Whether a class normalises and is nothing more: a `PreNormBlock` only begins with it."""
    _, norm, rest = cls.rpartition("Norm")
    return bool(norm) and not rest.startswith("al") and _MORE_THAN_NORM.isdisjoint(words(rest))


def says_conv(cls: str) -> bool:
    """Whether it is a convolution; `Conv1D` of transformers is a matrix."""
    return bool(re.search(r"Conv(\dd|Transpose|$)", cls))
