"""A PyTorch run that is stopped, saved by `torch.save` and resumed, beside one that is not."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks._resumed import Bits, Resumed, first_difference
from benchmarks._torch.device import DEVICE
from benchmarks._torch.measured_optimizers import training_step
from benchmarks.workloads import Workload, load

Make = Callable[[nn.Module], Optimizer]
"""From a model to its optimizer."""


class Run:
    """A freshly built model and optimizer.

    Args:
        make: builds the optimizer.
        workload: what is trained.
        seed: of the initial weights.
    """

    def __init__(self, make: Make, workload: Workload, seed: int = 0) -> None:
        self._model = workload.init(seed)
        self._optimizer = make(self._model)
        self._step = training_step(workload, self._model, self._optimizer)

    def train(self, batches: Iterable[Any]) -> None:
        """One step on each of the batches."""
        for batch in batches:
            self._step(batch)

    def state(self) -> dict[str, Any]:
        """What is saved."""
        return {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what was saved."""
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])


def resume(
    make: Make,
    name: str,
    data: str | None = None,
    *,
    steps: int,
    stop: int,
    folder: Path,
) -> Resumed:
    """Trains without a stop; and stops, saves, builds everything anew, loads and goes on.

    Args:
        make: builds the optimizer.
        name: of the workload.
        data: its text file, if it is not the usual one.
        steps: of both runs.
        stop: steps before the stop, fewer than `steps`.
        folder: where the checkpoint goes; it has to be empty.
    """
    if DEVICE.type == "cuda":  # which adds in any order unless told not to
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    workload = load(name, data, "torch")
    batches = list(itertools.islice(workload.batches(0), steps))
    whole = Run(make, workload)
    whole.train(batches)
    stopped = Run(make, workload)
    stopped.train(batches[:stop])
    path = folder / "checkpoint.pt"
    torch.save(stopped.state(), path)
    fresh = Run(make, workload, seed=1)  # so that what is not loaded is seen
    # The file was written a moment ago, so whatever an optimizer keeps may be in it.
    fresh.load(torch.load(path, map_location=DEVICE, weights_only=False))
    fresh.train(batches[stop:])
    return Resumed(
        bytes_on_disk=path.stat().st_size,
        first_difference=first_difference(dict(leaves(whole.state())), dict(leaves(fresh.state()))),
    )


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What is in a nested state, by path; of a tensor, what identifies its bits."""
    if isinstance(value, torch.Tensor):
        yield path, _bits(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from leaves(item, f"{path}[{i}]")
    else:
        yield path, value


def _bits(tensor: torch.Tensor) -> Bits:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return str(tensor.dtype), tuple(tensor.shape), flat.numpy().tobytes()
