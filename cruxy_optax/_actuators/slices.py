"""Parts of a tensor with a size and a rate of their own: rows, blocks, slices of fused q, k, v."""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from cruxy_control.checks import check_bounds, check_count, check_range
from cruxy_control.formulas import trust as formulas
from cruxy_control.formulas.trust import ANY_RATIO, RMS_BLOCK
from cruxy_control.slices import Slices, check_slices
from cruxy_optax._distributed.axes import as_axes, mean_over_shards, mean_square, split_axes
from cruxy_optax._roles import labelled
from cruxy_optax._tree import accumulator_dtype, as_floating, root

Layout = Mapping[str, Slices]
"""How tensors are sliced, by dotted path or a shell pattern for it."""


class Sliced(NamedTuple):
    """The slices of one tensor, for its shape.

    Attributes:
        tensor: its dotted path.
        axis: that they lie along.
        names: of those that are not empty, of q, k and v.
        members: which elements along the axis are in which; bool, `(slices, elements)`.
    """

    tensor: str
    axis: int
    names: tuple[str, ...]
    members: np.ndarray


Part = str | Sliced
"""How one tensor is divided: `"tensor"`, `"row"`, `"block"`, or into slices."""


def parts_of(tree: Any, per: str, slices: Layout | None) -> list[Part]:
    """How each leaf of a tree is divided, in order; with `per="slice"` one without slices whole.

    Raises:
        ValueError: where a path of `slices` is none in the tree, or a tensor does not fit.
    """
    if per != "slice":
        return [per] * len(jax.tree.leaves(tree))
    found = sliced(tree, slices or {})
    return ["tensor" if part is None else part for part in found]


def sliced(tree: Any, slices: Layout) -> list[Sliced | None]:
    """The slices of each leaf of a tree, in order; `None` for one that has none.

    Raises:
        ValueError: where a path of `slices` is none in the tree, or a tensor does not fit.
    """
    leaves = labelled(tree, None, ()).leaves
    for pattern in slices:
        if not any(fnmatch.fnmatchcase(leaf.name, pattern) for leaf in leaves):
            raise ValueError(
                "slices must name tensors by their dotted path or a shell pattern for it, got "
                f"{pattern!r}, which is none of {_some(leaf.name for leaf in leaves)}; "
                'give one of them, or one like "*.qkv.kernel".'
            )
    here = [leaf for leaf in leaves if not isinstance(leaf.value, optax.MaskedNode)]
    return [_fitted(leaf.name, jnp.shape(leaf.value), slices) for leaf in here]


def _some(names: Iterable[str]) -> str:
    first = list(names)
    return ", ".join(first[:8]) + (", ..." if len(first) > 8 else "")


def _fitted(name: str, shape: tuple[int, ...], slices: Layout) -> Sliced | None:
    """The slices of the tensor of a name, by the first pattern that matches."""
    found = [one for pattern, one in slices.items() if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        return None
    own = found[0]
    check_slices(name, own, shape)
    parts = [(part, ranges) for part, ranges in own.parts() if ranges]
    members = np.zeros((len(parts), shape[own.axis]), bool)
    for row, (_, ranges) in zip(members, parts, strict=True):
        for start, stop in ranges:
            row[start:stop] = True
    return Sliced(name, own.axis, tuple(part for part, _ in parts), members)


def mean_squares(x: jax.Array, part: Part, axis_names: Sequence[str] = ()) -> jax.Array:
    """The mean square of every part of a tensor; float32, in the shape that a state keeps.

    `()` for a tensor; one element along the last axis for rows, and for blocks as many as there
    are; `(slices,)`; 0 of what is empty. Over all shards along those of `axis_names` along which
    the leaf is split; blocks are those of a shard.
    """
    if part == "tensor" or not x.ndim or (part == "row" and x.ndim < 2):
        return mean_square(x, axis_names)
    wide = x.astype(accumulator_dtype(x))
    squares = wide * wide
    if isinstance(part, Sliced):
        others = tuple(axis for axis in range(x.ndim) if axis != part.axis)
        along = jnp.sum(squares, axis=others)
        total = jnp.where(part.members, along, 0.0).sum(axis=1)
        count = np.maximum(1, part.members.sum(axis=1) * (x.size // x.shape[part.axis]))
        return mean_over_shards(total * (x.size / count), x, axis_names)
    if part == "row":
        total = jnp.sum(squares, axis=-1, keepdims=True)
        return mean_over_shards(total * (x.size / max(1, x.shape[-1])), x, axis_names)
    blocks = _cut(squares)
    count = np.minimum(RMS_BLOCK, x.shape[-1] - RMS_BLOCK * np.arange(blocks.shape[-2]))
    return (blocks.sum(axis=-1) / count).astype(jnp.float32)


def norms(x: jax.Array, part: Part, axis_names: Sequence[str] = ()) -> jax.Array:
    """The Euclidean norm of a tensor, or of every row of it; as `mean_squares`."""
    count = x.shape[-1] if part == "row" and x.ndim > 1 else x.size
    shards = math.prod(lax.psum(1, axis) for axis in axis_names if axis in split_axes(x))
    return root(mean_squares(x, part, axis_names) * float(count * shards))


def spread(values: jax.Array, x: jax.Array, part: Part) -> jax.Array:
    """What each part of a tensor has, in a shape that broadcasts to the tensor."""
    if isinstance(part, Sliced):
        along = jnp.where(part.members, values[:, None], 0.0).sum(axis=0)
        return along.reshape([-1 if axis == part.axis else 1 for axis in range(x.ndim)])
    if part == "block" and x.ndim:
        whole = jnp.broadcast_to(values[..., None], (*values.shape, RMS_BLOCK))
        flat = whole.reshape(*values.shape[:-1], values.shape[-1] * RMS_BLOCK)
        return flat[..., : x.shape[-1]]
    return values


def _cut(x: jax.Array) -> jax.Array:
    """The last axis in blocks, filled up with zeros."""
    blocks = -(-x.shape[-1] // RMS_BLOCK)
    rest = blocks * RMS_BLOCK - x.shape[-1]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rest)])
    return x.reshape(*x.shape[:-1], blocks, RMS_BLOCK)


def scale_by_slices(
    slices: Layout, rates: Mapping[str, chex.Numeric]
) -> optax.GradientTransformation:
    """Multiplies the slices of fused tensors by rates of their own: queries, keys and values.

    One float32 vector along the axis of the slices is multiplied in; everything else stays as it
    is, to the bit. Inside `stabilize` it stands before `scale_by_meta_learning_rate`, as
    `scale_by_role` does. `python -m benchmarks components` measures what Tiger's rates of q, k and
    v are worth.

    Args:
        slices: where q, k and v lie in a tensor, by the tensor's dotted path or a shell pattern for
            it (`"*.qkv.kernel"`), of which the first that matches counts. `qkv_slices(params)`
            finds them, `cruxy_control.slices` has the usual layouts.
        rates: a factor of at least 0 for each of `"q"`, `"k"` and `"v"`; what has none is 1.

    Returns:
        An `optax.GradientTransformation` without state.

    Raises:
        ValueError: where a rate is below 0 or none of these; from `init` and `update` where a
            path is that of no tensor, or the slices of a tensor do not fill it.

    Examples:
        >>> import jax.numpy as jnp, cruxy_optax
        >>> from cruxy_control.slices import blocks
        >>> slices = {"*.qkv": blocks(2, 2, 2, axis=1)}
        >>> tx = cruxy_optax.scale_by_slices(slices, {"k": 0.5, "v": 2.0})
        >>> updates = {"attention": {"qkv": jnp.ones((1, 6))}}
        >>> print(tx.update(updates, tx.init(updates))[0]["attention"]["qkv"])
        [[1.  1.  0.5 0.5 2.  2. ]]
    """
    remedy = "1 changes nothing"
    rates = {
        name: check_range(f"rates[{name!r}]", rate, 0.0, remedy=remedy)
        for name, rate in rates.items()
    }

    if not {"q", "k", "v"}.issuperset(rates):
        raise ValueError(
            f'rates must be of the slices "q", "k" and "v", got {sorted(rates)}; name those alone.'
        )

    def vector(part: Sliced) -> jax.Array:
        return jnp.stack([jnp.asarray(rates.get(name, 1.0), jnp.float32) for name in part.names])

    def init_fn(params: optax.Params) -> optax.EmptyState:
        sliced(params, slices)
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        scaled = [
            u if part is None else _times(vector(part), u, part)
            for u, part in zip(leaves, sliced(updates, slices), strict=True)
        ]
        return treedef.unflatten(scaled), state

    return optax.GradientTransformation(init_fn, update_fn)


def _times(values: jax.Array, update: jax.Array, part: Sliced) -> jax.Array:
    return as_floating(update * spread(values, update, part), update)


class BalanceSlicesState(NamedTuple):
    """The rates of slices that were found."""

    count: jax.Array  # good steps so far; shape=(), dtype=int32
    multipliers: dict[str, jax.Array]  # by path of the tensor; shape=(slices,), dtype=float32
    slice_dispersion: jax.Array  # largest before the last correction; shape=(), dtype=float32

    telemetry = ("slice_dispersion",)


def balance_slices(
    slices: Layout,
    *,
    every: int = formulas.BALANCE_EVERY,
    clip: chex.Numeric = formulas.BALANCE_CLIP,
    bounds: tuple[float, float] = formulas.BALANCE_BOUNDS,
    axis_names: str | Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    r"""Finds rates for the slices of fused tensors that make their steps alike.

    Every 25 good steps each slice is pulled towards the median of the slices of its tensor, in two
    things: the root mean square $r$ of its step and its trust ratio
    $T = \max(\mathrm{rms}(\theta), 10^{-3}) / r$, both with the multiplier $m$ of the slice:

    $$
    D = \sqrt{0.7 \ln^2 \frac{\max r}{\min r} + 0.3 \ln^2 \frac{\max T}{\min T}}, \qquad
    m \leftarrow m \exp\Big(\frac{D}{1 + D} \Big(0.7 \ln \frac{\mathrm{med}\, r}{r}
    + 0.3 \ln \frac{T}{\mathrm{med}\, T}\Big)\Big)
    $$

    A correction is at most `1 - clip` to `1 + clip`, a multiplier at least 0.7 and at most 1.3.
    The period, the weights of $D$ and the bounds are those of Tiger, the strength
    $D / (1 + D)$ and `clip` this package's. It stands behind the direction, before the learning
    rate. Nothing measured so far speaks for rates by slices.

    Args:
        slices: see `scale_by_slices`.
        every: good steps between two corrections, at least 1.
        clip: how far from 1 a correction is at most, in `(0, 1)`.
        bounds: the smallest and the largest multiplier, around 1.
        axis_names: axes of an enclosing `jax.shard_map` over which parameters may be split, but
            not along the axis of the slices.

    Returns:
        An `optax.GradientTransformationExtraArgs`; its state has a float32 number a slice.
        Telemetry shows the largest $D$ as `slice_dispersion`.

    Raises:
        ValueError: where an argument is outside its range; from `init` and `update` as in
            `scale_by_slices`; from `update` without `params`.

    Examples:
        >>> import jax.numpy as jnp, cruxy_optax
        >>> from cruxy_control.slices import blocks
        >>> slices = {"qkv": blocks(1, 1, 1)}
        >>> tx = cruxy_optax.balance_slices(slices, every=1)
        >>> params, steps = {"qkv": jnp.ones(3)}, {"qkv": jnp.array([1.0, 2.0, 0.5])}
        >>> updates, state = tx.update(steps, tx.init(params), params)
        >>> print(updates["qkv"])
        [1.   1.8  0.55]
    """
    every = check_count("every", every, 1, remedy="25 is Tiger's")
    remedy = "0.1 corrects by a tenth at most"
    limits: Any = {"lower_open": True, "upper_open": True}
    clip = check_range("clip", clip, 0.0, 1.0, **limits, remedy=remedy)
    bounds = check_bounds("bounds", bounds, 0.0, float("inf"), around=1.0, remedy="use (0.7, 1.3)")
    axes = as_axes(axis_names)

    def init_fn(params: optax.Params) -> BalanceSlicesState:
        parts = [part for part in sliced(params, slices) if part]
        ones = {part.tensor: jnp.ones(len(part.names), jnp.float32) for part in parts}
        return BalanceSlicesState(jnp.zeros((), jnp.int32), ones, jnp.zeros((), jnp.float32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, BalanceSlicesState]:
        del extra_args
        if params is None:
            raise ValueError(
                "balance_slices() measures the parameters, but got params=None; call "
                "update(grads, state, params)."
            )
        count = jnp.asarray(optax.safe_increment(state.count))
        due = count % every == 0
        leaves, treedef = jax.tree.flatten(updates)
        multipliers, apart = dict(state.multipliers), [jnp.zeros((), jnp.float32)]
        for i, (p, part) in enumerate(
            zip(jax.tree.leaves(params), sliced(updates, slices), strict=True)
        ):
            if part is None:
                continue
            size = root(mean_squares(jnp.asarray(leaves[i]), part, axes))
            own = root(mean_squares(jnp.asarray(p), part, axes))
            trust = formulas.trust_ratio(own, size, ANY_RATIO, formulas.TRUST_FLOOR, xp=jnp)
            old = multipliers[part.tensor]
            new, dispersion = formulas.balance_slices(old, size, trust, clip, bounds, xp=jnp)
            multipliers[part.tensor] = jnp.where(due, new, old)
            apart.append(dispersion)
            leaves[i] = _times(multipliers[part.tensor], leaves[i], part)
        largest = jnp.where(due, jnp.stack(apart).max(), state.slice_dispersion)
        return treedef.unflatten(leaves), BalanceSlicesState(count, multipliers, largest)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
