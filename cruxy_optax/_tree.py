"""Finding a kind of node in any pytree: a state inside the states of whatever stands around it."""

from typing import Any

import jax

Kind = type | tuple[type, ...]


def find_with_paths(tree: Any, kind: Kind) -> list[tuple[tuple[Any, ...], Any]]:
    """Every node of a kind with its path, in order; what is below such a node is not searched."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda n: isinstance(n, kind))
    return [(path, node) for path, node in flat if isinstance(node, kind)]


def find(tree: Any, kind: Kind) -> list[Any]:
    """The same nodes alone."""
    return [node for _, node in find_with_paths(tree, kind)]
