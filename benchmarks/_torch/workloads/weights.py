"""What a workload's PyTorch twin is, and how it gets the weights that training in JAX starts from.

Batches need no twin: those of the workload are NumPy arrays.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from flax import nnx
from torch import Tensor, nn

from benchmarks.workloads import ALONE, NAMES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where twins are trained."""

# Flax has a kernel's outputs last and its inputs before them, PyTorch the outputs first.
_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}


class Twin(NamedTuple):
    """A workload's model, loss and figure in PyTorch, on `DEVICE`.

    Attributes:
        make: a new model, its weights drawn from PyTorch's global generator.
        loss: model and a batch of the workload to the training loss, a float32 scalar.
        held_out: model to the workload's figure.
    """

    make: Callable[[], nn.Module]
    loss: Callable[[Any, Any], Tensor]
    held_out: Callable[[Any], float]


def load_twin(name: str, data: str | None = None) -> Twin:
    """The twin of the workload of that name.

    Args:
        name: one of `benchmarks.workloads.NAMES`.
        data: a text file for the language models; `None` for the text they come with.

    Raises:
        ValueError: if there is no such workload or it has no twin.
    """
    family, _, size = name.partition("-")
    if name not in NAMES or name in ALONE:
        twins = ", ".join(known for known in NAMES if known not in ALONE)
        raise ValueError(
            f"the workload must be one of {twins} to be trained in PyTorch, got {name!r}."
        )
    module = importlib.import_module(f"benchmarks._torch.workloads.{family}")
    if family == "shakespeare":
        return module.twin(size, None if data is None else Path(data))
    return module.twin(size)


def named_arrays(tree: nnx.State) -> dict[str, np.ndarray]:
    """Parameters or gradients of a Flax model by their name and in their layout in PyTorch."""
    arrays: dict[str, np.ndarray] = {}
    for path, leaf in nnx.to_flat_state(tree):
        *module, kind = map(str, path)
        array = np.array(jax.device_get(leaf[...]))
        if kind == "kernel":
            array = array.transpose(_AXES[array.ndim])
        arrays[".".join([*module, "bias" if kind == "bias" else "weight"])] = array
    return arrays


def copy_weights(params: nnx.State, model: nn.Module) -> None:
    """Gives a PyTorch model the weights of its Flax twin.

    Raises:
        RuntimeError: if a parameter has no counterpart or one of another shape.
    """
    arrays = named_arrays(params)
    model.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
