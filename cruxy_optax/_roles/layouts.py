"""`qkv_slices`: where q, k and v lie in fused kernels, where their shape tells it."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from cruxy_control.roles import Rule
from cruxy_control.slices import Slices, blocks, check_slices
from cruxy_optax._roles.parameters import labelled

_PARTS = {"attention.qkv": (1, 1, 1), "attention.kv": (0, 1, 1)}
"""By role, how many of the indices of their own axis are q, k and v."""


def qkv_slices(
    params: Any,
    rules: Iterable[Rule] = (),
    *,
    slices: Mapping[str, Slices] | None = None,
    model: Any = None,
) -> dict[str, Slices]:
    """Where queries, keys and values lie in the kernels and biases that hold all of them.

    Known is what has an axis of its own for the three, as linen's and nnx's general layers make
    it: `(width, 3, heads, size)`, and `(2, heads, width, size)` of keys and values. Such an axis is
    the only one of its length, 3 or 2. No other layout is guessed.

    Args:
        params: see `label_roles`.
        rules: likewise.
        slices: by a shell pattern for the dotted path, where they lie by your own word, which comes
            first; a `cruxy_control.slices.Slices`, made by `blocks`, `per_head`, `per_group` or
            `repeated`.
        model: see `label_roles`.

    Returns:
        By the dotted path of each parameter of the roles `attention.qkv` and `attention.kv`, and of
        each bias of theirs, the ranges of q, k and v along one axis.

    Raises:
        ValueError: where a layout is not known, or does not fill the tensor.
        TypeError: where a value of `slices` is no `Slices`.

    Examples:
        >>> import jax.numpy as jnp, cruxy_optax
        >>> params = {"attn": {"qkv": {"kernel": jnp.ones((8, 3, 2, 4))}}}
        >>> cruxy_optax.qkv_slices(params)
        {'attn.qkv.kernel': Slices(axis=1, q=((0, 1),), k=((1, 2),), v=((2, 3),))}
    """
    given = slices or {}
    result: dict[str, Slices] = {}
    for leaf in labelled(params, model, rules).present:
        role = leaf.label.of if leaf.label.role == "bias" else leaf.label.role
        if role not in _PARTS:
            continue
        shape, parts = leaf.parameter.shape, _PARTS[role]
        by_hand = [given[key] for key in given if fnmatch.fnmatchcase(leaf.name, key)]
        if not by_hand and shape.count(sum(parts)) != 1:
            raise ValueError(
                f"where q, k and v lie must be known of {leaf.name} (shape {shape}), which has no "
                f"axis of length {sum(parts)} for them alone; say it with "
                f'slices={{"{leaf.name}": cruxy_control.slices.blocks(...)}}.'
            )
        found = by_hand[0] if by_hand else blocks(*parts, axis=shape.index(sum(parts)))
        check_slices(leaf.name, found, shape)
        result[leaf.name] = found
    return result
