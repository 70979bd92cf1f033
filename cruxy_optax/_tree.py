"""What is asked of any tree: its nodes of a kind, what its leaves add up in, buffers of its own."""

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Kind = type | tuple[type, ...]


def nodes_with_paths(tree: Any, wanted: Callable[[Any], bool]) -> list[tuple[tuple[Any, ...], Any]]:
    """Every wanted node with its path, in order; what is below such a node is not searched."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=wanted)
    return [(path, node) for path, node in flat if wanted(node)]


def find_with_paths(tree: Any, kind: Kind) -> list[tuple[tuple[Any, ...], Any]]:
    """Every node of a kind with its path."""
    return nodes_with_paths(tree, lambda node: isinstance(node, kind))


def find(tree: Any, kind: Kind) -> list[Any]:
    """The same nodes alone."""
    return [node for _, node in find_with_paths(tree, kind)]


def field(node: Any, name: Any) -> Any:
    """A part of a node by its name, also where the node came apart into a mapping."""
    if isinstance(node, Mapping):
        return node[name]
    return getattr(node, name) if isinstance(name, str) else node[name]


def at(node: Any, path: tuple[Any, ...]) -> Any:
    """What is at a path, also where nodes on it came apart into mappings."""
    for key in path:
        name = getattr(key, "name", getattr(key, "key", None))
        node = field(node, key.idx if name is None else name)
    return node


def as_arrays(tree: Any) -> Any:
    """The tree with its plain numbers as arrays, which is what optax's own parts take them for."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, numbers.Number) else x, tree)


def accumulator_dtype(leaf: jax.typing.ArrayLike) -> jnp.dtype:
    """float32, or float64 for a float64 leaf."""
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


@jax.custom_jvp
def root(x: jax.Array) -> jax.Array:
    """`sqrt(x)` with the derivative 0 at 0: an infinite one, times 0, ends as NaN.

    Who differentiates through a step of an optimizer meets zeros in every gradient.
    """
    return jnp.sqrt(x)


@root.defjvp
def _root_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    y, (tangent,) = root(*primals), tangents
    some = y > 0.0
    return y, jnp.where(some, tangent / (2.0 * jnp.where(some, y, 1.0)), 0.0)


def materialize(*scalars: Any) -> tuple[jax.Array, ...]:
    """The same scalars, float32, computed once and kept.

    XLA on CPU copies cheap arithmetic into every loop that uses it, and would work the tail of the
    control law out again for every parameter. Neither a barrier nor a stack alone stops it: the
    one is dropped before fusion, the other is folded away.

    Not for a scalar of each tensor: XLA compiles what is alike for many tensors once, and a place
    of its own in a stack makes every one of them another.
    """
    # A stack of one would be no stack.
    row = [jnp.asarray(s, jnp.float32) for s in (*scalars, *([0.0] if len(scalars) == 1 else []))]
    packed = lax.optimization_barrier(jnp.stack(row))
    return tuple(packed[i] for i in range(len(scalars)))


def as_floating(x: jax.Array, like: Any) -> jax.Array:
    """`x` in the dtype of `like`, where that is a floating one."""
    dtype = jnp.result_type(like)
    return x.astype(dtype) if jnp.issubdtype(dtype, jnp.floating) else x


def where(ok: jax.Array, x: Any, otherwise: Any = None) -> jax.Array:
    """`x` where a scalar holds and else something like it, zeros unless given.

    One operation a tensor, where `jnp.where` makes a function of its own.
    """
    x = jnp.asarray(x)
    otherwise = jnp.zeros_like(x) if otherwise is None else jnp.asarray(otherwise)
    alike = x.shape == otherwise.shape and x.dtype == otherwise.dtype
    return lax.select(ok, x, otherwise) if alike else jnp.where(ok, x, otherwise)


def check_real(leaves: Sequence[Any]) -> None:
    """Raises `TypeError` where a leaf is complex: the law's norms and signs are for real numbers.

    Raises:
        TypeError: with the rule, the dtype received and the remedy.
    """
    for leaf in leaves:
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"parameters and gradients must be real, got {jnp.asarray(leaf).dtype}; optimize "
                "the real and imaginary part as two leaves, as "
                "optax.contrib.split_real_and_imaginary does."
            )


def unshared(state: Any) -> Any:
    """Gives every leaf a buffer of its own, as donating the state asks for."""
    seen: set[int] = set()

    def own(leaf: Any) -> Any:
        if id(leaf) in seen:
            return jnp.array(leaf, copy=True)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, state)
