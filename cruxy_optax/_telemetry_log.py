"""Writes telemetry to JSON lines and TensorBoard without stopping the device every step."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

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
        path: a file for JSON lines; appended to. One object a step: its `step`, the `timestamp`
            at which it was logged (seconds since 1970, UTC), then what was logged under its own
            names. A value that is not finite is written as `null`, which JSON has no other word
            for. `None` for no file.
        writer: anything with `add_scalar(tag, value, step)`, such as
            `tensorboardX.SummaryWriter`; gets finite values under `cruxy/<name>`. `None` for none.
        every: steps between two writes, at least 1.

    Raises:
        ValueError: where there is neither a path nor a writer, or `every` is below 1.

    Examples:
        >>> import jax.numpy as jnp, json, pathlib, tempfile, cruxy_optax
        >>> tx = cruxy_optax.meta3(1e-3)
        >>> params = jnp.ones(3)
        >>> state = tx.init(params)
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "telemetry.jsonl"
        >>> with cruxy_optax.TelemetryLog(path) as log:
        ...     for step in range(3):
        ...         _, state = tx.update(params, state, params, value=1.0)
        ...         log.log(step, cruxy_optax.telemetry(state))
        >>> lines = path.read_text().splitlines()
        >>> len(lines), list(json.loads(lines[0]))[:2]
        (3, ['step', 'timestamp'])
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
        self._waiting: list[_Row] = []

    def log(self, step: int | jax.Array, values: Mapping[str, Any]) -> None:
        """Takes one step's telemetry.

        Args:
            step: the training step, the x axis.
            values: what `telemetry` gave; further scalars may be added. Dictionaries in it, as of
                several controllers, are written as `path/name`.
        """
        self._waiting.append(_Row(time.time(), step, dict(_flat(values))))
        if len(self._waiting) >= self._every:
            self.flush()

    def flush(self) -> None:
        """Writes what is waiting; waits for the device.

        Raises:
            TypeError: where a value is no scalar, with its name and step.
            RuntimeError: where one cannot be read, as of a donated state. In both cases all other
                values and rows have been written by then.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        faults: list[Exception] = []
        for number, row in enumerate(_fetch(waiting)):
            try:
                step: Any = _readable(row.step, "step", f"row {number}")
            except (RuntimeError, TypeError) as fault:
                faults.append(fault)
                continue
            self._write(int(step), row.logged_at, _numbers(row, int(step), faults))
        if self._file is not None:
            self._file.flush()
        if faults:
            raise faults[0]

    def _write(self, step: int, logged_at: float, numbers: Mapping[str, Any]) -> None:
        if self._file is not None:
            line = {"step": step, "timestamp": logged_at, **numbers}
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
        if self._writer is not None:
            for name, number in numbers.items():
                if number is not None:
                    self._writer.add_scalar(f"cruxy/{name}", float(number), step)

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


class _Row(NamedTuple):
    """What one call of `log` was given."""

    logged_at: float
    step: Any
    values: dict[str, Any]


class _Unread(NamedTuple):
    """Stands where a value could not be brought to the host."""

    error: Exception


def _fetch(rows: list[_Row]) -> list[_Row]:
    """The rows on the host, in one transfer; value by value where one of them cannot be read."""
    try:
        return jax.device_get(rows)
    except Exception:
        return jax.tree.map(_fetch_one, rows)


def _fetch_one(value: Any) -> Any:
    try:
        return jax.device_get(value)
    except Exception as error:
        return _Unread(error)


def _numbers(row: _Row, step: int, faults: list[Exception]) -> dict[str, float | int | bool | None]:
    """What there is to write, by name; what cannot be read is left out and added to `faults`."""
    numbers = {}
    for name, value in row.values.items():
        try:
            numbers[name] = _readable(value, name, f"step {step}")
        except (RuntimeError, TypeError) as fault:
            faults.append(fault)
    return numbers


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif prefix or name not in ("step", "timestamp"):  # the row's own stand first
            yield prefix + name, value


def _readable(value: Any, name: str, row: str) -> float | int | bool | None:
    """The number; `None` for one that is not finite, and for `None`.

    Raises:
        RuntimeError: where it could not be read.
        TypeError: where it is no number.
    """
    if isinstance(value, _Unread):
        raise RuntimeError(
            f"{name!r} of {row} cannot be read, {value.error}; where the state is donated, call "
            "telemetry() inside the jitted step and log what that returns."
        ) from value.error
    number = value.item() if getattr(value, "shape", None) == () else value
    if number is None or (isinstance(number, float) and not math.isfinite(number)):
        return None
    if isinstance(number, bool | int | float):
        return number
    shape = f" of shape {value.shape}" if hasattr(value, "shape") else ""
    raise TypeError(
        f"{name!r} of {row} must be a real scalar, got {type(value).__name__}{shape}; log its mean "
        "or its norm, or leave it out."
    )
