"""What identifies a training run, and what it leaves behind."""

from typing import Any, NamedTuple


class Task(NamedTuple):
    """One training run, by everything that its result depends on besides the code.

    Attributes:
        workload: a name that `workloads.load` knows.
        optimizer: a name of the registry of its framework.
        rate: its learning rate.
        seed: of the initial weights and of the batches.
        steps: optimizer steps; a schedule is laid over them.
        evaluate_at: steps after which the held-out figure is taken, rising, the last one `steps`.
        fault: a name of `faults.FAULTS`.
        framework: "jax" or "torch".
        data: a text file for the language models, or the text they ship with.
    """

    workload: str
    optimizer: str
    rate: float
    seed: int
    steps: int
    evaluate_at: tuple[int, ...]
    fault: str = "none"
    framework: str = "jax"
    data: str | None = None


class Record(NamedTuple):
    """The outcome of a run.

    Attributes:
        start: the held-out figure of the initial weights.
        held_out: the figure after each of the task's `evaluate_at`; NaN where it is not finite.
        losses: the training loss of every step.
        finite: whether parameters and moments are finite at the end and nothing is NaN.
        skipped: steps the guard skipped; `None` where there is no guard.
        state_bytes_per_parameter: of the optimizer's state.
        seconds: of the whole run, compilation included.
    """

    start: float
    held_out: tuple[float, ...]
    losses: tuple[float, ...]
    finite: bool
    skipped: int | None
    state_bytes_per_parameter: float
    seconds: float

    def final_training_loss(self, window: int = 50) -> float:
        """Mean training loss of the last `window` steps."""
        last = self.losses[-window:]
        return sum(last) / len(last)


def to_json(entry: Task | Record) -> dict[str, Any]:
    """The fields by name; floats are rounded to seven digits, more than float32 holds."""
    return {
        name: [_short(item) for item in value] if isinstance(value, tuple) else _short(value)
        for name, value in entry._asdict().items()
    }


def _short(value: Any) -> Any:
    return float(f"{value:.7g}") if isinstance(value, float) else value


def task_from_json(fields: dict[str, Any]) -> Task:
    """The inverse of `to_json`."""
    return Task(**{**fields, "evaluate_at": tuple(fields["evaluate_at"])})


def record_from_json(fields: dict[str, Any]) -> Record:
    """The inverse of `to_json`."""
    tuples = {name: tuple(fields[name]) for name in ("held_out", "losses")}
    return Record(**{**fields, **tuples})
