"""Sums over shards: all that knows along which axes of a mesh a tensor is split."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from cruxy_optax._tree import accumulator_dtype


def as_axes(axis_names: str | Sequence[str]) -> tuple[str, ...]:
    """Names of mesh axes as a tuple; one may come as a string."""
    return (axis_names,) if isinstance(axis_names, str) else tuple(axis_names)


def split_axes(leaf: jax.Array) -> frozenset[str]:
    """The `shard_map` axes along which devices hold different values of the leaf."""
    kind = jax.typeof(leaf)
    if hasattr(kind, "manual_axis_type"):
        return kind.manual_axis_type.varying
    return getattr(kind, "vma", frozenset())  # the name before jax 0.10


def explicit_spec(leaf: jax.Array) -> tuple[str | tuple[str, ...] | None, ...]:
    """The axes of an explicit mesh that each axis of the leaf is split along, `None` for none."""
    return tuple(jax.typeof(leaf).sharding.spec)


def mean_over_axes(x: jax.Array, axis_names: Sequence[str]) -> jax.Array:
    """The mean of what every device along these axes has."""
    return lax.pmean(x, tuple(axis_names)) if axis_names else x


def sum_over_shards(
    sums: Sequence[jax.Array],
    leaves: Sequence[jax.Array],
    axis_names: Sequence[str],
    replica_axes: Sequence[str] = (),
) -> jax.Array:
    """The sum of one number a leaf, over all leaves and all their shards; float32, or float64.

    Args:
        sums: of each leaf, what this device makes of its part.
        leaves: which say along which axes they are split.
        axis_names: axes of an enclosing `jax.shard_map` or `jax.pmap`.
        replica_axes: those along which every device has a leaf of its own: the mean over them.
    """
    total = jnp.zeros((), jnp.float32)
    for partial, leaf in zip(sums, leaves, strict=True):
        split = split_axes(leaf)
        for axis in axis_names:
            # A leaf that varies along the axis is a shard of a parameter; one that does not is a
            # copy, and the mean of equal copies is that copy.
            partial = lax.psum(partial, axis) if axis in split else lax.pmean(partial, axis)
        total = total + partial
    return mean_over_axes(total, replica_axes)


def mean_square(leaf: jax.Array, axis_names: Sequence[str] = ()) -> jax.Array:
    """The mean of the squares of a leaf, over all its shards; float32, 0 of an empty leaf."""
    wide = leaf.astype(accumulator_dtype(leaf))
    # On an explicit mesh JAX asks where a product over split axes lies, but not a sum.
    total = jnp.sum(wide * wide) if any(explicit_spec(leaf)) else jnp.vdot(wide, wide)
    return mean_over_shards(total, leaf, axis_names)


def mean_over_shards(
    total: jax.Array, leaf: jax.Array, axis_names: Sequence[str] = ()
) -> jax.Array:
    """The mean over a leaf and all its shards, from the sum over this one; float32, 0 of none."""
    mean = total.astype(jnp.float32) / max(1, leaf.size)
    split = [axis for axis in axis_names if axis in split_axes(leaf)]
    return lax.pmean(mean, split) if split else mean


def whole_mean_square(
    squares: Sequence[jax.Array], leaves: Sequence[jax.Array], axis_names: Sequence[str] = ()
) -> jax.Array:
    """The mean of the squares of all elements of all leaves, from each leaf's `mean_square`."""
    counts = [
        leaf.size * math.prod(lax.psum(1, a) for a in axis_names if a in split_axes(leaf))
        for leaf in leaves
    ]
    total = max(1, sum(counts))
    shares = [square * (n / total) for square, n in zip(squares, counts, strict=True)]
    return sum(shares, jnp.zeros((), jnp.float32))
