"""Sums over shards: all that knows along which axes of a mesh a tensor is split.

A sum over a sharded array becomes a sum on each device and an all-reduce. XLA packs those that it
meets into one, up to the first that depends on one of them. So nothing here flattens what may be
sharded, which would gather it, and `together` makes a stage of what belongs to one. On explicit
axes a number can be in parts, one a device: those of all tensors are added up before anything is
sent.
"""

import functools
import inspect
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from cruxy_optax._tree import accumulator_dtype, materialize


def shard_alike(x: Any, y: Any) -> tuple[Any, Any]:
    """Both, split over devices alike; as they are from jax 0.11 on, where XLA alone says how."""
    try:
        from jax.experimental import shard_alike as found
    except ImportError:
        return x, y
    return found.shard_alike(x, y)


def varying(x: jax.Array, axis_name: str) -> jax.Array:
    """What is the same on all devices, as what may differ along an axis of the mesh."""
    if hasattr(lax, "pcast"):
        return lax.pcast(x, axis_name, to="varying")
    before = getattr(lax, "pvary")  # noqa: B009  of jax before 0.9
    return before(x, axis_name)


def gathered(x: jax.Array, axis_name: str) -> jax.Array:
    """What every device has, stacked, and known to be the same on all."""
    if axis_name not in split_axes(x):
        return lax.all_gather(x, axis_name)
    before = getattr(lax, "all_gather_invariant", None)  # of jax before 0.9
    return before(x, axis_name) if before else lax.all_gather(x, axis_name, to="invarying")


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


def is_spread(leaf: jax.Array) -> bool:
    """Whether the leaf lies on several devices that `jax.jit` divides it over."""
    mesh = jax.typeof(leaf).sharding.mesh
    manual = set(getattr(mesh, "manual_axes", ()))
    return any(size > 1 for name, size in mesh.shape.items() if name not in manual)


_KEEPS_PARTS = "out_sharding" in inspect.signature(lax.reduce_sum).parameters
"""Whether this jax has sums that stay in parts."""


def sum_in_parts(x: jax.Array) -> jax.Array:
    """The sum of an array; along the explicit axes that split it, what each device has of it.

    `sum_of_numbers` and `mean_over_shards` make the whole of it.
    """
    axes = frozenset(jax.tree.leaves(explicit_spec(x)))
    if not (axes and _KEEPS_PARTS):
        return jnp.sum(x)
    parts = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(unreduced=axes))
    return lax.reduce_sum(x, axes=tuple(range(x.ndim)), out_sharding=parts)


def _axes_of_parts(number: jax.Array) -> frozenset[str]:
    """The explicit axes along which every device has a part of a number."""
    return frozenset(getattr(jax.typeof(number).sharding.spec, "unreduced", ()))


def _whole(number: jax.Array) -> jax.Array:
    """The number that all parts add up to."""
    if not _axes_of_parts(number):
        return number
    everywhere = NamedSharding(jax.typeof(number).sharding.mesh, PartitionSpec())
    return jax.sharding.reshard(number, everywhere)


def inner_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """The sum of all products of two arrays of one shape, as `sum_in_parts` has it."""
    # On one device of a CPU a product of vectors is faster than a sum. What is spread is not
    # flattened. A GPU may cut factors to TensorFloat-32 unless told not to.
    if is_spread(a) or is_spread(b):
        return sum_in_parts(a * b)
    return jnp.vdot(a, b, precision=lax.Precision.HIGHEST)


def together(
    numbers: Sequence[jax.Array], leaves: Sequence[jax.Array], axis_names: Sequence[str] = ()
) -> list[jax.Array]:
    """The same numbers, none of which is there before all scalars among them are; see `after`."""
    one = after(numbers, leaves, axis_names)
    return list(numbers) if one is None else [n * one.astype(n.dtype) for n in numbers]


def after(
    numbers: Sequence[jax.Array], leaves: Sequence[jax.Array], axis_names: Sequence[str] = ()
) -> jax.Array | None:
    """A 1 that is not there before all of these numbers are; `None` where nothing waits for sums.

    What is multiplied by it comes after the sums of all tensors, and not between them: so XLA packs
    the sums. It keeps no barrier that long.

    Args:
        numbers: at least 0, from sums over shards; what is no scalar does not count.
        leaves: arrays of which one is spread if any is.
        axis_names: axes of an enclosing `jax.shard_map` or `jax.pmap`.
    """
    scalars = [n.astype(jnp.float32) for n in numbers if not n.ndim]
    if len(scalars) < 2 or not (axis_names or any(map(is_spread, leaves))):
        return None
    # No number is below 0, which XLA cannot know.
    (one,) = materialize(jnp.where(lax.stop_gradient(sum(scalars)) < 0.0, 0.0, 1.0))
    return one


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
    parts = []
    for partial, leaf in zip(sums, leaves, strict=True):
        # A leaf that varies along an axis is a shard of a parameter; one that does not is a copy,
        # and the mean of equal copies is that copy.
        copies = math.prod(lax.psum(1, a) for a in axis_names if a not in split_axes(leaf))
        parts.append(partial if copies == 1 else partial / copies)
    total = sum_of_numbers(parts, leaves)
    total = lax.psum(total, tuple(axis_names)) if axis_names else total
    return mean_over_axes(total, replica_axes)


def sum_of_numbers(numbers: Sequence[jax.Array], leaves: Sequence[jax.Array]) -> jax.Array:
    """The sum of one number a leaf, which may be in parts; float32, or float64."""
    groups: dict[frozenset[str], list[jax.Array]] = {}
    for number in numbers:
        groups.setdefault(_axes_of_parts(number), []).append(number)
    total = sum(groups.pop(frozenset(), []), jnp.zeros((), jnp.float32))
    for parts in groups.values():
        total = total + _whole(functools.reduce(operator.add, parts))
    if total.dtype == jnp.float32 and any(map(is_spread, leaves)):
        return materialize(total)[0]  # or XLA adds them up again for everything that reads the sum
    return total


def mean_square(leaf: jax.Array, axis_names: Sequence[str] = ()) -> jax.Array:
    """The mean of the squares of a leaf, over all its shards; float32, 0 of an empty leaf."""
    wide = leaf.astype(accumulator_dtype(leaf))
    return mean_over_shards(inner_product(wide, wide), leaf, axis_names)


def mean_over_shards(
    total: jax.Array, leaf: jax.Array, axis_names: Sequence[str] = ()
) -> jax.Array:
    """The mean over a leaf and all its shards, from the sum over this one; float32, 0 of none."""
    # A float: no integer of 32 bits counts the elements of a large stack of layers.
    mean = _whole(total).astype(jnp.float32) / float(max(1, leaf.size))
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
    return sum_of_numbers(shares, leaves)


def whatever_the_axes(
    f: Callable[[list[jax.Array]], list[jax.Array]], leaves: Sequence[jax.Array]
) -> list[jax.Array]:
    """`f` of the leaves with explicit axes of their mesh as automatic ones; sharded as before."""
    arrays = list(map(jnp.asarray, leaves))
    if not any(any(explicit_spec(leaf)) for leaf in arrays):
        return f(arrays)
    out = [jax.typeof(leaf).sharding for leaf in arrays]
    automatic: Any = jax.sharding.auto_axes(f, out_sharding=out)
    return automatic(arrays)


def map_over_devices(
    f: Callable[[jax.Array], jax.Array],
    stack: jax.Array,
    leaves: Sequence[jax.Array],
    spec: Sequence[str | tuple[str, ...] | None] = (),
) -> jax.Array:
    """`f` of a stack, one of its elements whole on each device at a time.

    Each device gathers the parts of one element from all the others, and gives them back. Without
    several devices it is `f` of the whole stack.

    Args:
        f: takes and gives a stack of any length, element by element.
        stack: of whatever sharding, which is kept.
        leaves: some of which know their mesh.
        spec: what splits each axis of what the stack was made of, where that is known.
    """
    mesh = next((jax.typeof(x).sharding.mesh for x in (stack, *leaves) if is_spread(x)), None)
    if mesh is None:
        return f(stack)
    names = _one_after_another(mesh, spec)
    devices = math.prod(mesh.shape[name] for name in names)
    length = len(stack)
    rounds = -(-length // devices)
    stack = jnp.pad(stack, [(0, rounds * devices - length)] + [(0, 0)] * (stack.ndim - 1))
    one_each = PartitionSpec(tuple(names), *[None] * (stack.ndim - 1))
    own = jax.shard_map(f, mesh=mesh, in_specs=one_each, out_specs=one_each)

    def one_round(each: jax.Array) -> jax.Array:
        # An axis of the mesh at a time: of more than one XLA makes a gather of everything.
        steps = [_led_by(mesh, names[:count], each.ndim) for count in range(1, len(names))]
        found = each
        for step in steps:
            found = lax.with_sharding_constraint(found, step)
        found = own(found)
        for step in reversed(steps):
            found = lax.with_sharding_constraint(found, step)
        return shard_alike(found, each)[0]

    found = lax.map(one_round, stack.reshape(rounds, devices, *stack.shape[1:]))
    return found.reshape(stack.shape)[:length]


def _one_after_another(
    mesh: AbstractMesh, spec: Sequence[str | tuple[str, ...] | None]
) -> list[str]:
    """The axes of a mesh that split something, in an order in which XLA can take them from it.

    Along those that hold copies first, then of several that split one axis the last before the
    others: in any other order everything is gathered. Where nothing is known, the last first.
    """
    names = [name for name, size in mesh.shape.items() if size > 1]
    split = [name for name in jax.tree.leaves(list(spec)) if name in names] or names
    return [name for name in names if name not in split] + split[::-1]


def _led_by(mesh: AbstractMesh, names: Sequence[str], axes: int) -> NamedSharding:
    """The first of several axes split along these axes of a mesh, the others as they come."""
    free = [PartitionSpec.UNCONSTRAINED] * (axes - 1)
    return NamedSharding(mesh, PartitionSpec(tuple(names), *free))
