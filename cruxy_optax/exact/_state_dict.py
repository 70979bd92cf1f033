"""The parameters of Flax nnx modules under the names and in the layout of PyTorch."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

_TORCH: dict[str, tuple[str, Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]]
_TORCH = {
    "kernel": (
        "weight",
        lambda x: jnp.transpose(x, (*range(x.ndim - 1, x.ndim - 3, -1), *range(x.ndim - 2))),
        lambda x: jnp.transpose(x, (*range(2, x.ndim), 1, 0)),
    ),
    "scale": ("weight", lambda x: x, lambda x: x),
    "embedding": ("weight", lambda x: x, lambda x: x),
}
"""PyTorch's name of a parameter, and the way to its layout and back."""


def state_dict(model: nnx.Module) -> dict[str, jax.Array]:
    """The parameters of a model under PyTorch's names and in its layout.

    A model built of the same modules under the same names in `cruxy_torch.exact` loads them and
    goes on with the same bits; `exact.checksum` of both is the same.

    Args:
        model: of any nnx modules. `kernel`, `scale` and `embedding` become `weight`; a kernel's
            last two axes come first, the other way round.

    Returns:
        Arrays by name.
    """
    return {name: there(param[...]) for name, param, there, _ in _named(model)}


def load_state_dict(model: nnx.Module, arrays: Mapping[str, Any]) -> None:
    """Gives a model the parameters that `state_dict` or PyTorch's returned; in place.

    Args:
        model: the model.
        arrays: by name; NumPy's, JAX's, or PyTorch's on CPU.

    Raises:
        ValueError: where a name or a shape is another. The model is then as it was.
    """
    found = list(_named(model))
    names = {name for name, *_ in found}
    if names != set(arrays):
        raise ValueError(
            f"arrays must have the names of the model, got {sorted(set(arrays) - names)} too many "
            f"and {sorted(names - set(arrays))} too few; rename them."
        )
    new = {name: back(jnp.asarray(arrays[name])) for name, _, _, back in found}
    for name, param, _, _ in found:
        if new[name].shape != param.shape or new[name].dtype != param.dtype:
            raise ValueError(
                f"{name} must be {param.dtype} of a shape that fits {param.shape}, got "
                f"{new[name].dtype} {tuple(arrays[name].shape)}; build the same model."
            )
    for name, param, _, _ in found:
        param[...] = new[name]


def _named(model: nnx.Module) -> Any:
    """PyTorch's name, the parameter, and the way to PyTorch's layout and back."""
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name, there, back = _TORCH.get(str(path[-1]), (str(path[-1]), _same, _same))
        yield ".".join([*map(str, path[:-1]), name]), param, there, back


def _same(x: jax.Array) -> jax.Array:
    return x
