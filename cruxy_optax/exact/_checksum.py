"""The checksum of a pytree, the one that PyTorch has of a `state_dict`."""

import sys
from typing import Any

import jax
import jax.numpy as jnp

from cruxy_exact import checksum as core


def checksum(tree: Any, *, bits: int = 20, grain: int | None = None) -> str:
    """16 hexadecimal digits that stand for every bit of a model.

    The same numbers under the same names have the same checksum in PyTorch and NumPy, whatever the
    devices and the sharding.

    Args:
        tree: any pytree of float32 arrays, whose names are the keys of their paths, joined by dots;
            or a Flax nnx module, whose names and layout are then those of PyTorch
            (`exact.nnx.state_dict`).
        bits: of the matrix products; `Precision.bits`.
        grain: samples in a grain; `None` where gradients were not accumulated in grains.

    Returns:
        The digits.

    Raises:
        TypeError: where an array is not float32.

    Examples:
        >>> import jax.numpy as jnp
        >>> from cruxy_optax import exact
        >>> exact.checksum({"layer": {"w": jnp.ones((2, 3))}}) == exact.checksum(
        ...     {"layer.w": jnp.ones((2, 3))})
        True
    """
    return core.checksum(named(tree), bits=bits, grain=grain, xp=jnp)


def named(tree: Any) -> dict[str, jax.Array]:
    """The arrays of a tree by name."""
    flax: Any = sys.modules.get("flax.nnx")
    if flax is not None and isinstance(tree, flax.Module):
        from cruxy_optax.exact._state_dict import state_dict

        return state_dict(tree)
    if flax is not None and isinstance(tree, flax.State):
        tree = flax.to_pure_dict(tree)
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(map(_name, path)): jnp.asarray(x) for path, x in flat}


def _name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
