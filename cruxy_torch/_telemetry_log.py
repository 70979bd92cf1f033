"""The log of the telemetry: one JSON line a step, written a batch at a time."""

import json
import math
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cruxy_torch._distributed.shards import is_first_rank
from cruxy_torch._telemetry import named


class TelemetryLog:
    """Appends a JSON line a step to a file, and waits for the device only once a batch.

    A line holds the `step`, a `timestamp` in seconds since 1970 and the telemetry by its own names,
    as `cruxy_optax.TelemetryLog` writes them. Numbers that are not finite are written as `null`,
    which is what JSON has. Under `torch.distributed` only rank 0 writes.

    Args:
        path: the file; lines are appended to what it holds.
        names: of what a line holds, from `_telemetry.shown`.
        every: steps per batch.
    """

    def __init__(self, path: str | Path, names: frozenset[str], every: int = 100) -> None:
        self.path, self.names, self.every = Path(path), names, every
        self._rows: list[tuple[float, Tensor]] = []
        self._finalizer = weakref.finalize(self, _write, self.path, self.names, self._rows)

    def log(self, row: Tensor) -> None:
        """Keeps one step's vector, as `_telemetry.everything` gives it."""
        if row.is_meta:  # `estimate_memory` takes a step that computes nothing
            return
        self._rows.append((time.time(), row))
        if len(self._rows) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Writes what is kept. Also happens when the optimizer is dropped or Python ends."""
        _write(self.path, self.names, self._rows)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "names": self.names, "every": self.every}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


def _write(path: Path, names: frozenset[str], rows: list[tuple[float, Tensor]]) -> None:
    if not rows or not is_first_rank():
        rows.clear()
        return
    times, vectors = zip(*rows, strict=True)
    rows.clear()
    with path.open("a", encoding="utf-8") as file:
        for moment, numbers in zip(times, torch.stack(vectors).tolist(), strict=True):
            values = named(numbers, names)
            line = {"step": values.pop("step"), "timestamp": moment, **values}
            file.write(json.dumps({name: _plain(value) for name, value in line.items()}) + "\n")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
