"""What bad batches do to gradients or targets in JAX, the only framework they are tried in."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Corruption(NamedTuple):
    """What one kind of bad batch does.

    Attributes:
        gradients: takes the true gradients and gives the corrupted ones.
        batch: takes a good batch of NumPy arrays and gives a bad one.
    """

    gradients: Callable[[Any], Any] = lambda gradients: gradients
    batch: Callable[[Any], Any] = lambda batch: batch


def _scaled(factor: float) -> Callable[[Any], Any]:
    return lambda gradients: jax.tree.map(lambda g: factor * g, gradients)


def _in_largest_leaf(value: float) -> Callable[[Any], Any]:
    def corrupt(gradients: Any) -> Any:
        leaves, structure = jax.tree.flatten(gradients)
        hit = max(range(len(leaves)), key=lambda i: leaves[i].size)
        leaves[hit] = leaves[hit].at[(0,) * leaves[hit].ndim].set(value)
        return jax.tree.unflatten(structure, leaves)

    return corrupt


def _first_leaf(value: float) -> Callable[[Any], Any]:
    def corrupt(gradients: Any) -> Any:
        first, *others = jax.tree.leaves(gradients)
        structure = jax.tree.structure(gradients)
        return jax.tree.unflatten(structure, [jnp.full_like(first, value), *others])

    return corrupt


def _shuffled_integers(batch: Any) -> Any:
    """Every integer array with its elements in a random order: labels, tokens."""
    rng = np.random.default_rng(0)

    def shuffled(array: np.ndarray) -> np.ndarray:
        if not np.issubdtype(array.dtype, np.integer):
            return array
        return rng.permutation(array.reshape(-1)).reshape(array.shape)

    return jax.tree.map(shuffled, batch)


CORRUPTIONS = {
    "times-10": Corruption(gradients=_scaled(10.0)),
    "times-100": Corruption(gradients=_scaled(100.0)),
    "times-1000": Corruption(gradients=_scaled(1000.0)),
    "twice-1000": Corruption(gradients=_scaled(1000.0)),
    "huge": Corruption(gradients=_in_largest_leaf(1e30)),
    "nan": Corruption(gradients=_first_leaf(float("nan"))),
    "inf": Corruption(gradients=_first_leaf(float("inf"))),
    "labels": Corruption(batch=_shuffled_integers),
}
"""By the names of `benchmarks.faults.FAULTS`, "none" left out."""
