"""What a training run reports: a progress bar, a table, a plot and a JSON file.

Knows NumPy, rich and matplotlib and no framework, so that every demo reports alike.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# Okabe and Ito (2008): told apart with any colour vision. One colour and one dash pattern each.
STYLES: dict[str, dict[str, Any]] = {
    "adamw": {"color": "#000000", "linestyle": (0, (4, 1.5))},
    "meta3": {"color": "#0072B2", "linestyle": "-"},
    "meta_lion": {"color": "#D55E00", "linestyle": "-"},
    "self_driving": {"color": "#E69F00", "linestyle": "-"},
    "stability_v1": {"color": "#009E73", "linestyle": (0, (1, 1))},
    "stability_v2": {"color": "#CC79A7", "linestyle": (0, (5, 1, 1, 1))},
}

# Telemetry key and heading.
PANELS = (
    ("learning_rate", "learning rate"),
    ("phase", "phase (0.5: a steady gradient)"),
    ("beta1", "beta1"),
    ("clip_threshold", "clip threshold (norm of the gradient)"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One optimizer's training run.

    Attributes:
        optimizer: its name, a key of `STYLES`.
        label: its name for people.
        learning_rate: what it was given.
        telemetry: one array a quantity, shape `(steps,)`: `loss` and `learning_rate`, and of a
            controlled optimizer everything its telemetry holds.
        validation: pairs (steps taken, validation loss), the last one after the last step.
        seconds_per_step: median over the run, without compilation.
        state_bytes_per_parameter: bytes of optimizer state per model parameter.
        skipped: steps the guard skipped; `None` where there is no guard.
    """

    optimizer: str
    label: str
    learning_rate: float
    telemetry: Mapping[str, np.ndarray]
    validation: Sequence[tuple[int, float]]
    seconds_per_step: float
    state_bytes_per_parameter: float
    skipped: int | None


def progress_bar(console: Console) -> Progress:
    """A bar with the newest loss, rate and phase; a task needs the field `reading`."""
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[reading]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
        expand=True,
    )


def reading(telemetry: Mapping[str, Any]) -> str:
    """The newest loss, rate and phase as one short text of fixed width.

    Args:
        telemetry: scalars by name; a missing `phase` is shown as a dash.
    """
    phase = f"{telemetry['phase']:.2f}" if "phase" in telemetry else "   -"
    return f"loss {telemetry['loss']:5.3f}  rate {telemetry['learning_rate']:.1e}  phase {phase}"


def best_run(runs: Sequence[Run]) -> Run:
    """The run with the lowest validation loss at the end; one that diverged is worse than any."""
    return min(runs, key=lambda run: np.nan_to_num(run.validation[-1][1], nan=np.inf))


def table(runs: Sequence[Run], *, seed: int) -> Table:
    """The runs side by side, one line each, the best validation loss in bold."""
    result = Table(title=f"After {len(runs[0].telemetry['loss']):,} steps")
    result.add_column("Optimizer")
    for heading in (
        "Learning\nrate",
        f"Validation\nloss\n(seed {seed})",
        "Time per\nstep (ms)",
        "Bytes of\nstate per\nparameter",
        "Skipped\nsteps",
    ):
        result.add_column(heading, justify="right")
    for run in runs:
        result.add_row(
            run.label,
            f"{run.learning_rate:g}",
            Text(f"{run.validation[-1][1]:.4f}", style="bold" if run is best_run(runs) else ""),
            f"{1e3 * run.seconds_per_step:.2f}",
            f"{run.state_bytes_per_parameter:.3f}",
            "no guard" if run.skipped is None else str(run.skipped),
        )
    return result


def write_results(path: Path, runs: Sequence[Run], settings: Mapping[str, Any]) -> None:
    """Writes the table's figures and the settings behind them as JSON.

    Args:
        path: the file to write.
        runs: what the table shows.
        settings: whatever is needed to run this again; JSON values.
    """
    rows = [
        {
            "optimizer": run.optimizer,
            "learning_rate": run.learning_rate,
            "validation_loss": run.validation[-1][1],
            "validation": [list(point) for point in run.validation],
            "milliseconds_per_step": 1e3 * run.seconds_per_step,
            "state_bytes_per_parameter": run.state_bytes_per_parameter,
            "skipped_steps": run.skipped,
        }
        for run in runs
    ]
    path.write_text(json.dumps({"settings": dict(settings), "runs": rows}, indent=2) + "\n")


def plot(runs: Sequence[Run], path: Path, *, title: str) -> None:
    """Draws the loss curves, and below them the controller's telemetry, as a PNG.

    Args:
        runs: at least one.
        path: the file to write.
        title: the heading.
    """
    figure = Figure(figsize=(10, 9.5), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(2.2, 1, 1))
    losses = figure.add_subplot(grid[0, :])
    _plot_losses(losses, runs)
    losses.set_title(title, loc="left", fontweight="bold")
    for place, (key, name) in enumerate(PANELS):
        row, column = divmod(place, 2)
        axes = figure.add_subplot(grid[1 + row, column], sharex=losses)
        _plot_telemetry(axes, runs, key)
        axes.set_title(name, loc="left", fontsize="medium")
        if row == 0:
            axes.tick_params(labelbottom=False)
        else:
            axes.set_xlabel("step")
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _plot_losses(axes: Axes, runs: Sequence[Run]) -> None:
    steps = len(runs[0].telemetry["loss"])
    window = max(1, steps // 50)
    shown: list[np.ndarray] = []
    for run in runs:
        style = STYLES[run.optimizer]
        loss = np.asarray(run.telemetry["loss"], dtype=np.float64)
        smooth = np.convolve(loss, np.full(window, 1 / window), mode="valid")
        axes.plot(np.arange(window, steps + 1), smooth, linewidth=1, **style)
        at, validation = zip(*run.validation, strict=True)
        axes.plot(at, validation, "o", markersize=5, color=style["color"], clip_on=False)
        label = f"{run.label}: {validation[-1]:.3f}"
        axes.plot([], [], marker="o", markersize=5, label=label, **style)
        shown += [smooth[min(2 * window, len(smooth) - 1) :], np.asarray(validation)]
    # The fall from chance level would take most of the height.
    values = np.concatenate(shown)
    if np.isfinite(values).any():
        axes.set_ylim(top=values[np.isfinite(values)].max())
    axes.set_xlim(0, steps)
    axes.set_ylabel("loss (nats per character)")
    axes.legend(
        title=f"line: training, mean of {window} steps\npoint: validation, the last in figures",
        alignment="left",
        frameon=False,
        handlelength=3.5,
    )


def _plot_telemetry(axes: Axes, runs: Sequence[Run], key: str) -> None:
    for run in runs:
        if key in run.telemetry:
            values = np.asarray(run.telemetry[key], dtype=np.float64)
            # A law that does not clip has an infinite threshold, which no axis can show.
            values = np.where(np.isfinite(values), values, np.nan)
            steps = np.arange(1, len(values) + 1)
            axes.plot(steps, values, linewidth=0.8, alpha=0.85, **STYLES[run.optimizer])
    if key == "learning_rate":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:g}")
