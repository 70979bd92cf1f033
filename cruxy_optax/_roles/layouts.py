"""`qkv_slices`: where q, k and v lie in fused kernels, where their shape tells it."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from cruxy_control.roles import Rule
from cruxy_control.slices import Slices, blocks, check_slices
from cruxy_optax._roles.parameters import Leaf, labelled

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

    Known is what has an axis of its own for the three, of length 3, or 2 of keys and values: a
    kernel of linen's and nnx's general layers, `(width, 3, heads, size)`, its bias, and the weight
    of an einsum, called so by name or class, `(3, heads, width, size)`. Layers that are stacked
    have axes before these. No other axis may have that length, and no other layout is guessed: an
    axis of 3 elsewhere may be that of three heads or three layers.

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
    fused = [leaf for leaf in labelled(params, model, rules).present if _role(leaf) in _PARTS]
    kernels = {leaf.parameter.path[:-1]: leaf for leaf in fused if leaf.label.role != "bias"}
    for leaf in fused:
        shape, parts = leaf.parameter.shape, _PARTS[_role(leaf)]
        by_hand = [given[key] for key in given if fnmatch.fnmatchcase(leaf.name, key)]
        axis = None if by_hand else _axis(leaf, kernels.get(leaf.parameter.path[:-1]), sum(parts))
        if not by_hand and axis is None:
            raise ValueError(
                f"where q, k and v lie must be known of {leaf.name} (shape {shape}), which has no "
                f"axis of length {sum(parts)} for them alone, before those of heads and sizes; say "
                f'it with slices={{"{leaf.name}": cruxy_control.slices.blocks(...)}}.'
            )
        found = by_hand[0] if axis is None else blocks(*parts, axis=axis)
        check_slices(leaf.name, found, shape)
        result[leaf.name] = found
    return result


def _role(leaf: Leaf) -> str:
    """Its own, or of a bias that of what it belongs to."""
    return leaf.label.of or "" if leaf.label.role == "bias" else leaf.label.role


def _axis(leaf: Leaf, kernel: Leaf | None, length: int) -> int | None:
    """The axis that is there for q, k and v alone; `None` where there is none for sure."""
    parameter, shape = leaf.parameter, leaf.parameter.shape
    axis = len(shape) - 3
    if leaf.label.role == "bias":
        whole = () if kernel is None else kernel.parameter.shape
        known = (*whole[:-4], *whole[-3:]) == shape
    else:
        known = len(shape) > 3
        if any("einsum" in name.lower() for name in (*parameter.path[-2:], parameter.owners[-1])):
            axis -= 1
    return axis if known and shape.count(length) == 1 and shape[axis] == length else None
