"""`qkv_slices`: where q, k and v lie in a model's fused tensors, from their owners and config."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from cruxy_control.roles import Rule, own_index
from cruxy_control.slices import Slices, blocks, check_slices, per_group, per_head, repeated
from cruxy_torch._roles.parameters import Found, find, modules_of


def qkv_slices(
    model: nn.Module,
    rules: Iterable[Rule] = (),
    *,
    slices: Mapping[str, Slices] | None = None,
) -> dict[str, Slices]:
    """Where queries, keys and values lie in the weights and biases that hold all of them.

    Known are `torch.nn.MultiheadAttention`, timm's attention, and of transformers GPT-2, ImageGPT,
    GPT-BigCode, CodeGen, GPT-NeoX, BLOOM, Falcon, Persimmon, MPT, DBRX, ModernBERT and Phi-3, each
    with its numbers of heads, and what is derived from them. No other is guessed.

    Args:
        model: any.
        rules: see `label_roles`.
        slices: by a shell pattern for the name, where they lie by your own word, which comes first;
            a `cruxy_control.slices.Slices`, made by `blocks`, `per_head`, `per_group` or
            `repeated`.

    Returns:
        By the name of each parameter of the roles `attention.qkv` and `attention.kv`, and of each
        bias of theirs, the ranges of q, k and v along one axis.

    Raises:
        ValueError: where a layout is not known, or does not fill the tensor.
        TypeError: where a value of `slices` is no `Slices`.

    Examples:
        >>> import torch
        >>> import cruxy_torch
        >>> attention = torch.nn.MultiheadAttention(8, num_heads=2)
        >>> cruxy_torch.qkv_slices(attention)["in_proj_weight"]
        Slices(axis=0, q=((0, 8),), k=((8, 16),), v=((16, 24),))
    """
    return slices_in(model, find(model, rules), slices or {})


def slices_in(
    model: nn.Module, found: Iterable[Found], given: Mapping[str, Slices]
) -> dict[str, Slices]:
    """Where q, k and v lie in these parameters of a model, of which some hold all of them.

    Raises:
        ValueError: where a layout is not known, or does not fill the tensor.
        TypeError: where a value of `given` is no `Slices`.
    """
    modules = modules_of(model)
    result: dict[str, Slices] = {}
    for one in found:
        if not is_fused(one):
            continue
        name, shape = one.names[0], one.parameter.shape
        by_hand = [given[key] for key in given if fnmatch.fnmatchcase(name, key)]
        known = by_hand[0] if by_hand else slices_of(one, modules)
        if known is None:
            raise ValueError(
                f"where q, k and v lie must be known of {name} (shape {shape}), which it is not of "
                f"its owner; say it with "
                f'slices={{"{name}": cruxy_control.slices.blocks(...)}}.'
            )
        check_slices(name, known, shape)
        result[name] = known
    return result


def is_fused(found: Found) -> bool:
    """Whether a parameter holds more than one of q, k and v."""
    role = found.label.of if found.label.role == "bias" else found.label.role
    return role in ("attention.qkv", "attention.kv")


def slices_of(found: Found, modules: Mapping[str, nn.Module]) -> Slices | None:
    """Where q, k and v lie by the nearest attention that is known; `None` where none is."""
    path = found.parameter.path
    above = [modules[".".join(path[:i])] for i in range(len(path) - 1, -1, -1)]
    owners = above[: len(path) - 1 - own_index(path)]  # with parametrizations and wrappers of it
    transposed = any(cls.__name__ == "Conv1D" for m in owners for cls in type(m).__mro__)
    for module in above:
        layout = _layout(module)
        if layout is not None:
            axis = 1 if transposed and len(found.parameter.shape) > 1 else 0
            return layout(module)._replace(axis=axis)
    return None


def _layout(module: nn.Module) -> Callable[[Any], Slices] | None:
    """What says where q, k and v lie in what an attention holds, where it is known."""
    for cls in type(module).__mro__:
        if cls is nn.MultiheadAttention:
            return lambda m: blocks(m.embed_dim, m.embed_dim, m.embed_dim)
        if cls.__name__ == "Attention" and cls.__module__.startswith("timm."):
            return lambda m: _equal(m.num_heads * m.head_dim)
        if cls.__name__ in _LAYOUTS:
            return _LAYOUTS[cls.__name__]
    return None


def _equal(width: int) -> Slices:
    """Three equal blocks."""
    return blocks(width, width, width)


def _gpt2(m: Any) -> Slices:
    width = m.num_heads * m.head_dim
    return blocks(0 if m.is_cross_attention else width, width, width)


def _bigcode(m: Any) -> Slices:
    if m.is_cross_attention:
        return blocks(0, m.embed_dim, m.embed_dim)
    if m.multi_query:
        return blocks(m.embed_dim, m.kv_dim, m.kv_dim)
    return per_head(m.num_heads, m.head_dim)


def _codegen(m: Any) -> Slices:
    part = m.num_attention_heads * m.head_dim // 4  # of four devices, which the weights remember
    return repeated(part, part, part, times=4, order="qvk")


def _falcon(m: Any) -> Slices:
    if m.new_decoder_architecture or m.multi_query:
        return per_group(m.num_kv_heads, m.num_heads // m.num_kv_heads, m.head_dim)
    return per_head(m.num_heads, m.head_dim)


def _grouped(heads: int, m: Any) -> Slices:
    keys = m.num_key_value_heads * m.head_dim
    return blocks(heads * m.head_dim, keys, keys)


_LAYOUTS: dict[str, Callable[[Any], Slices]] = {
    "GPT2Attention": _gpt2,
    "ImageGPTAttention": _gpt2,
    "DecisionTransformerGPT2Attention": _gpt2,
    "GPTBigCodeAttention": _bigcode,
    "CodeGenAttention": _codegen,
    "GPTNeoXAttention": lambda m: per_head(m.config.num_attention_heads, m.head_size),
    "BloomAttention": lambda m: per_head(m.num_heads, m.head_dim),
    "PersimmonAttention": lambda m: per_head(m.num_heads, m.head_dim),
    "FalconAttention": _falcon,
    "MptAttention": lambda m: _equal(m.n_heads * m.head_dim),
    "ModernBertAttention": lambda m: _equal(m.config.num_attention_heads * m.head_dim),
    "DbrxAttention": lambda m: _grouped(m.num_heads, m),
    "Phi3Attention": lambda m: _grouped(m.config.num_attention_heads, m),
}
"""By the class of the attention, its forward method's way to cut what it has computed."""
