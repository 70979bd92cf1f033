"""The log of the controller's telemetry: one JSON line a step, written a batch at a time."""

import json
import math
import time
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_torch import _law_state as _controller


class MetricsLog:
    """Appends a JSON line a step to a file, and waits for the device only once a batch.

    A line holds the telemetry, with the learning rate as `lr`, and a `timestamp`. Numbers that
    are not finite are written as `null`, which is what JSON has. Under `torch.distributed` only
    rank 0 writes.

    Args:
        path: the file; lines are appended to what it holds.
        every: steps per batch.
    """

    def __init__(self, path: str | Path, every: int = 100) -> None:
        self.path = Path(path)
        self.every = every
        self._rows: list[tuple[float, Tensor]] = []
        self._finalizer = weakref.finalize(self, _write, self.path, self._rows)

    def log(self, row: Tensor) -> None:
        """Keeps one step's vector, as `_controller.everything` gives it."""
        if row.is_meta:  # `estimate_memory` takes a step that computes nothing
            return
        self._rows.append((time.time(), row))
        if len(self._rows) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Writes what is kept. Also happens when the optimizer is dropped or Python ends."""
        _write(self.path, self._rows)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "every": self.every}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


def _write(path: Path, rows: list[tuple[float, Tensor]]) -> None:
    if not rows or (dist.is_available() and dist.is_initialized() and dist.get_rank() != 0):
        rows.clear()
        return
    times, vectors = zip(*rows, strict=True)
    rows.clear()
    with path.open("a", encoding="utf-8") as file:
        for moment, numbers in zip(times, torch.stack(vectors).tolist(), strict=True):
            line: dict[str, Any] = _controller.named(numbers)
            line = {"step": line.pop("step"), "lr": line.pop("learning_rate"), **line}
            line["timestamp"] = moment
            file.write(json.dumps({name: _plain(value) for name, value in line.items()}) + "\n")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
