"""Bad batches on purpose: what is done to gradients or targets at a few fixed steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Fault(NamedTuple):
    """One kind of bad batch.

    Attributes:
        label: for tables.
        gradients: takes the true gradients and gives the corrupted ones.
        batch: takes a good batch of NumPy arrays and gives a bad one.
        lasts: how many steps each strike lasts; they come at two, four and six tenths of a run.
    """

    label: str
    gradients: Callable[[Any], Any] = lambda gradients: gradients
    batch: Callable[[Any], Any] = lambda batch: batch
    lasts: int = 1

    def strikes(self, steps: int) -> tuple[int, ...]:
        """The steps, counted from 0, that are hit in a run of `steps`."""
        return tuple(share * steps // 10 + i for share in (2, 4, 6) for i in range(self.lasts))


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


FAULTS = {
    "none": Fault("clean"),
    "times-10": Fault("gradients times 10", gradients=_scaled(10.0)),
    "times-100": Fault("gradients times 100", gradients=_scaled(100.0)),
    "times-1000": Fault("gradients times 1000", gradients=_scaled(1000.0)),
    "twice-1000": Fault("times 1000, two steps running", gradients=_scaled(1000.0), lasts=2),
    "huge": Fault("one element 1e30", gradients=_in_largest_leaf(1e30)),
    "nan": Fault("NaN in one leaf", gradients=_first_leaf(float("nan"))),
    "inf": Fault("Inf in one leaf", gradients=_first_leaf(float("inf"))),
    "labels": Fault("labels shuffled", batch=_shuffled_integers),
}
"""Every fault by name."""
