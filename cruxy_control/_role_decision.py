"""The order in which a role is decided: class, output, names in and beside a part, shape."""

import re
from collections.abc import Sequence

from cruxy_control import _role_names as names
from cruxy_control._role_paths import Name, Parameter, Reading


def decide(parameter: Parameter, reading: Reading) -> tuple[str, str]:
    """The role of a weight, or of that beside a bias, and what told so."""
    own, kind, owner = reading.own, parameter.kind, reading.owner
    leaf = reading.leaf.lower()
    bare, flat = leaf not in names.LEAVES, is_vector(parameter.shape)
    layer = kind in ("linear", "conv", "attention")
    text = own.text.lower()
    by_class = not kind and not bare and names.is_norm(owner)
    if kind == "norm" or (by_class and (flat or names.says_norm(own.text))):
        return "norm", "class"
    if text not in names.TOKENS and _is_beside_a_weight(parameter, reading):
        return "vector", "shape"
    if "trainable_tokens_delta" in parameter.path:  # PEFT's rows of an embedding
        return "embedding", "name"
    if kind == "conv" or (not kind and names.says_conv(owner)):
        return "conv", "class"
    around = _around(reading.above)
    parent = around[0].text if around else ""
    if kind == "embedding" or (not layer and not bare and names.says_embedding("", owner)):
        return _looked_up(own.text, parent, owner), "class"
    # No weight, whatever stands around.
    alone = flat and (bare or leaf in names.SCALES or (not kind and len(parameter.shape) == 1))
    if text in names.TOKENS:
        return "position", "name"
    if not layer and names.says_position(own.text, "" if bare else owner):
        return "position", "name"
    if not layer and (reading.leaf == "embedding" or names.says_embedding(own.text)):
        return "embedding", "name"
    if not layer and bare and not flat and names.says_position(parent):
        return "position", "name"
    scales = reading.leaf == "scale" and not owner and "scale" not in names.words(own.text)
    is_norm = scales or names.says_norm(own.text)
    if is_norm and not layer and flat:
        return "norm", "name"
    stripped = re.sub(r"_(weight|bias)$", "", text) if bare else text
    beside = {name.lower() for name in parameter.siblings}
    if "a_log" in beside and stripped in names.SSM:
        return names.SSM[stripped], "context"
    if alone and not is_bias(parameter, leaf) and "bias" not in names.words(text):
        return "vector", "shape"
    text = stripped
    if _routes(text, owner, around, parameter.siblings):
        return "moe.router", "context"
    if parameter.is_output:
        return "head", "context"
    if kind in ("linear", "") and _is_head(text, own, parent, parameter.is_last):
        return "head", "name"
    role = _in_context(text, parameter, reading, around, beside)
    if role:
        return role, "context"
    if layer and parameter.is_last and (text.isdigit() or text.rstrip("0123456789_") in names.LAST):
        return "head", "context"
    if not kind and reading.leaf == "kernel" and len(parameter.shape) > 3:
        return "conv", "shape"
    is_matrix = (layer and not bare) or not flat
    return ("matrix" if is_matrix else "vector"), "shape"


def is_vector(shape: tuple[int, ...]) -> bool:
    """Whether at most one axis is longer than 1."""
    return sum(size != 1 for size in shape) <= 1


def is_bias(parameter: Parameter, leaf: str) -> bool:
    """Whether a parameter of this name is added to what its owner computes."""
    if "bias" in names.words(leaf) or (leaf in ("b", "beta") and is_vector(parameter.shape)):
        return True
    return leaf == "b" and "w" in parameter.owned and "a" not in parameter.owned  # of stacked ones


def _is_beside_a_weight(parameter: Parameter, reading: Reading) -> bool:
    """Whether it is one more vector of a layer, and neither its weight nor its bias."""
    leaf, kind = reading.leaf.lower(), parameter.kind
    if leaf in names.WEIGHTS or is_bias(parameter, leaf):
        return False
    if leaf in names.SCALES and not parameter.owned.isdisjoint(("weight", "kernel", "w")):
        return not names.says_norm(reading.own.text)
    layer = kind in ("linear", "conv", "attention", "embedding") or names.says_conv(reading.owner)
    looked_up = leaf in names.LEAVES and names.says_embedding("", reading.owner)
    return is_vector(parameter.shape) and (layer or looked_up)


def _looked_up(text: str, parent: str, owner: str) -> str:
    if names.says_position(text, owner):
        return "position"
    by_parent = not names.says_embedding(text) and names.says_position(parent)
    return "position" if by_parent else "embedding"


def _around(above: Sequence[Name]) -> list[Name]:
    """The names around, up to the nearest element of a list: what is beyond is another part."""
    end = next((i + 1 for i, name in enumerate(above) if name.numbered), len(above))
    return list(above[:end])


def _routes(text: str, owner: str, around: Sequence[Name], siblings: frozenset[str]) -> bool:
    if names.says_router(text, owner) or any(names.says_router(n.text, n.cls) for n in around):
        return True
    beside_experts = any(names.says_experts(name) for name in siblings)
    return (text == "gate" and beside_experts) or text == "shared_expert_gate"


def _is_head(text: str, own: Name, parent: str, is_last: bool) -> bool:
    if text in names.HEADS:
        return is_last or not own.numbered
    return text in names.INSIDE_A_HEAD and parent.lower() in names.HEADS


def _in_context(
    text: str, parameter: Parameter, reading: Reading, around: Sequence[Name], beside: set[str]
) -> str | None:
    """The role by name, in the nearest part that says attention or MLP, or by what is beside."""
    own = reading.own
    parent = around[0].text.lower() if around else ""
    experts = any(names.says_experts(n.text, n.cls) for n in (own, *around))
    experts = experts or names.says_experts("", reading.owner)
    context = _context(text, parameter.kind, parent, around, beside)
    role = None
    if own.numbered and parameter.place[1] == 2:
        unnamed = text in names.CHAINS and (context == "mlp" or experts)
        if unnamed or names.is_chain(own.text):
            role = ("mlp.up", "mlp.down")[parameter.place[0] - 1]
    if role is None and context == "attention":
        role = _attention(text, parent, beside)
    elif role is None and (context == "mlp" or experts):
        role = _mlp(text, parent, beside)
    in_layer = any(names.says(name) == "attention" for name in parameter.siblings)
    if role is None and in_layer and not own.numbered:
        role = names.BESIDE_ATTENTION.get(text)
    if role is None and not own.numbered and names.JOINED.keys() <= beside:
        role = names.JOINED.get(text)
    if text[-1:] in ("1", "2") and f"{text[:-1]}3" in beside and text[:-1] != "w":
        return None  # of three layers, the second is not the last
    if own.text == "Wi":
        return None  # ModernBERT's, a gate and more in one, as not all call so
    if role and experts and role.startswith("mlp."):
        return role.replace("mlp.", "moe.expert.")
    return role


def _context(text: str, kind: str, parent: str, around: Sequence[Name], beside: set[str]) -> str:
    if kind == "attention":
        return "attention"
    for name in around:
        said = names.says(name.text, "" if name.numbered else name.cls)
        if said:
            return said
    if _is_attention(beside):
        return "attention"
    return "mlp" if _is_mlp(beside) or (text, parent) == ("dense", "output") else ""


def _attention(text: str, parent: str, beside: set[str]) -> str | None:
    if text == "c_attn" and "q_attn" in beside:  # GPT-2's to another sequence
        return "attention.kv"
    if text in names.GENERAL and parent != "output" and beside and not _is_attention(beside):
        return None  # it may stand before the attention
    return names.ATTENTION.get(text)


def _mlp(text: str, parent: str, beside: set[str]) -> str | None:
    if text == "dense":  # BERT's, which is called as all of its layers are
        return {"intermediate": "mlp.up", "output": "mlp.down"}.get(parent)
    if text == "w1" and not beside.isdisjoint(("w3", "v1")):
        return "mlp.gate"
    if text == "w3" and "w12" in beside:
        return "mlp.down"
    return names.MLP.get(text)


def _is_attention(beside: set[str]) -> bool:
    roles = {names.ATTENTION.get(name) for name in beside}
    parts = roles & {"attention.q", "attention.k", "attention.v", "attention.kv"}
    return len(parts) > 1 or not names.FUSED.isdisjoint(beside)


def _is_mlp(beside: set[str]) -> bool:
    return {"mlp.gate", "mlp.up", "mlp.down"} <= {names.MLP.get(name) for name in beside}
