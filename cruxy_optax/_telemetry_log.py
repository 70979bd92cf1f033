"""Writes telemetry to JSON lines and TensorBoard without stopping the device every step."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import jax

from cruxy_control.checks import check_count


class ScalarWriter(Protocol):
    """What `tensorboardX.SummaryWriter` and `torch.utils.tensorboard.SummaryWriter` offer."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any:
        """Records one value."""
        ...


class TelemetryLog:
    """Collects telemetry on the device and writes it every so many steps.

    `log` keeps references to device scalars and returns at once; every `every` steps, and on
    `close`, all of them come to the host in one transfer. `every=1` writes, and waits, each step.

    Args:
        path: a file for JSON lines, one object a step with its `step` first; appended to. A value
            that is not finite is written as `null`, which JSON has no other word for. `None` for
            none.
        writer: anything with `add_scalar(tag, value, step)`, such as
            `tensorboardX.SummaryWriter`; gets finite values under `cruxy/<name>`. `None` for none.
        every: steps between two writes, at least 1.

    Raises:
        ValueError: where there is neither a path nor a writer, or `every` is below 1.

    Example:
        >>> import jax.numpy as jnp, pathlib, tempfile, cruxy_optax
        >>> tx = cruxy_optax.meta3(1e-3)
        >>> params = jnp.ones(3)
        >>> state = tx.init(params)
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "telemetry.jsonl"
        >>> with cruxy_optax.TelemetryLog(path) as log:
        ...     for step in range(3):
        ...         _, state = tx.update(params, state, params, value=1.0)
        ...         log.log(step, cruxy_optax.telemetry(state))
        >>> len(path.read_text().splitlines())
        3
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        writer: ScalarWriter | None = None,
        every: int = 100,
    ) -> None:
        check_count("every", every, 1, remedy="1 writes each step, 100 seldom waits")
        if path is None and writer is None:
            raise ValueError(
                "TelemetryLog needs a path or a writer, got neither; give path='telemetry.jsonl' "
                "or writer=tensorboardX.SummaryWriter()."
            )
        self._file = None if path is None else Path(path).open("a", encoding="utf-8")
        self._writer = writer
        self._every = every
        self._waiting: list[tuple[Any, Mapping[str, Any]]] = []

    def log(self, step: int | jax.Array, values: Mapping[str, Any]) -> None:
        """Takes one step's telemetry.

        Args:
            step: the training step, the x axis.
            values: what `telemetry` gave; further scalars may be added. Dictionaries in it, as of
                several controllers, are written as `path/name`.
        """
        self._waiting.append((step, values))
        if len(self._waiting) >= self._every:
            self.flush()

    def flush(self) -> None:
        """Writes what is waiting; waits for the device."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        for step, values in jax.device_get(waiting):
            step = int(step)
            numbers = {name: _plain(value) for name, value in _flat(values)}
            if self._file is not None:
                self._file.write(json.dumps({"step": step, **numbers}, allow_nan=False) + "\n")
            if self._writer is not None:
                for name, number in numbers.items():
                    if number is not None:
                        self._writer.add_scalar(f"cruxy/{name}", float(number), step)
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Writes what is waiting and closes the file; the writer is its owner's to close."""
        try:
            self.flush()
        finally:
            if self._file is not None:
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif prefix or name != "step":  # the row's own step stands first
            yield prefix + name, value


def _plain(value: Any) -> float | int | bool | None:
    number = value.item() if hasattr(value, "item") else value
    return number if not isinstance(number, float) or math.isfinite(number) else None
