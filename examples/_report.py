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

# Telemetry key and heading, in the order in which they are shown where a run is steered by them.
PANELS = (
    ("learning_rate", "learning rate"),
    ("alignment", "alignment of gradient and momentum: self-driving steers it to -0.25"),
    ("limit_scale", "share of the rate that the relative limit leaves: below 1 it binds"),
    ("phase", "phase (0.5: a steady gradient): the higher, the more Meta3 brakes"),
    ("clip_threshold", "clip threshold (norm of the gradient)"),
    ("beta1", "beta1"),
)

MOST_PANELS = 4

DOUBLE = 0.999
"""Two curves of one run whose correlation is above this say the same."""

FLAT = 1e-3
"""A curve whose values lie this close together, relative to their size, says nothing."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One optimizer's training run.

    Attributes:
        optimizer: its name, a key of `STYLES`.
        label: its name for people.
        learning_rate: what it was given; `None` for nothing.
        telemetry: one array a quantity, shape `(steps,)`: `loss` and `learning_rate`, and of a
            controlled optimizer everything its telemetry holds.
        validation: pairs (steps taken, validation loss), the last one after the last step; of a run
            that was stopped those before.
        seconds_per_step: median over the run, without compilation.
        state_bytes_per_parameter: bytes of optimizer state per model parameter.
        skipped: steps the guard skipped; `None` where there is no guard.
    """

    optimizer: str
    label: str
    learning_rate: float | None
    telemetry: Mapping[str, np.ndarray]
    validation: Sequence[tuple[int, float]]
    seconds_per_step: float
    state_bytes_per_parameter: float
    skipped: int | None

    @property
    def validation_loss(self) -> float:
        """The last one; NaN where a run was stopped before the first."""
        return self.validation[-1][1] if self.validation else float("nan")


def progress_bar(console: Console) -> Progress:
    """A bar with the newest loss, rate and signal; a task needs the field `reading`."""
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
    """The newest loss, rate and what steers it as one short text of fixed width.

    Args:
        telemetry: scalars by name; without `alignment` the `phase` is shown, without either a dash.
    """
    signal = "-"
    for key, name in (("alignment", "align"), ("phase", "phase")):
        if key in telemetry:
            signal = f"{name} {telemetry[key]:+.2f}"
            break
    rate = f"{telemetry['learning_rate']:.1e}"
    return f"loss {telemetry['loss']:5.3f}  rate {rate}  {signal:<11}"


def best_run(runs: Sequence[Run]) -> Run:
    """The run with the lowest validation loss at the end; one that diverged is worse than any."""
    return min(runs, key=lambda run: np.nan_to_num(run.validation_loss, nan=np.inf))


def table(runs: Sequence[Run], *, seed: int) -> Table:
    """The runs side by side, one line each, the best validation loss in bold."""
    taken = [len(run.telemetry["loss"]) for run in runs]
    title = f"After {taken[0]:,} steps"
    if taken[-1] < taken[0]:
        title += f", {runs[-1].label} after {taken[-1]:,}"
    result = Table(title=title)
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
            "no rate given" if run.learning_rate is None else f"{run.learning_rate:g}",
            Text(
                f"{run.validation_loss:.4f}" if run.validation else "none yet",
                style="bold" if run is best_run(runs) else "",
            ),
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
            "validation_loss": run.validation[-1][1] if run.validation else None,
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
    panels = chosen_panels(runs)
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 4.5 + 2.5 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, 2, height_ratios=(2.2, *[1] * rows))
    losses = figure.add_subplot(grid[0, :])
    _plot_losses(losses, runs)
    losses.set_title(title, loc="left", fontweight="bold")
    for place, (key, name) in enumerate(panels):
        row, column = divmod(place, 2)
        axes = figure.add_subplot(grid[1 + row, column], sharex=losses)
        _plot_telemetry(axes, runs, key)
        axes.set_title(name, loc="left", fontsize="small")
        if place + 2 < len(panels):
            axes.tick_params(labelbottom=False)
        else:
            axes.set_xlabel("step")
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def chosen_panels(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The first few of `PANELS` that show of at least one run what no panel before them shows.

    The learning rate is always one of them.
    """
    chosen: list[tuple[str, str]] = []
    for key, name in PANELS:
        before = [other for other, _ in chosen]
        if key == "learning_rate" or any(_says_something(run, key, before) for run in runs):
            chosen.append((key, name))
    return chosen[:MOST_PANELS]


def _says_something(run: Run, key: str, before: Sequence[str]) -> bool:
    """Whether a curve is neither flat nor one of the run's curves `before` over again."""
    curve = _curve(run, key)
    if curve is None or np.ptp(curve) <= FLAT * np.abs(curve).max():
        return False
    others = [other for other in (_curve(run, name) for name in before) if other is not None]
    # A flat curve has no correlation.
    moving = [other for other in others if len(other) == len(curve) and np.ptp(other) > 0]
    return all(abs(np.corrcoef(curve, other)[0, 1]) < DOUBLE for other in moving)


def _curve(run: Run, key: str) -> np.ndarray | None:
    """The finite values of a quantity; `None` where there are none.

    A law that does not clip has an infinite threshold, which no axis can show.
    """
    values = np.asarray(run.telemetry.get(key, ()), dtype=np.float64)
    values = values[np.isfinite(values)]
    return values if len(values) else None


def _plot_losses(axes: Axes, runs: Sequence[Run]) -> None:
    steps = len(runs[0].telemetry["loss"])
    window = max(1, min(len(run.telemetry["loss"]) for run in runs) // 50)
    shown: list[np.ndarray] = []
    for run in runs:
        style = STYLES[run.optimizer]
        loss = np.asarray(run.telemetry["loss"], dtype=np.float64)
        smooth = np.convolve(loss, np.full(window, 1 / window), mode="valid")
        axes.plot(np.arange(window, len(loss) + 1), smooth, linewidth=1, **style)
        validation = [value for _, value in run.validation]
        at = [taken for taken, _ in run.validation]
        axes.plot(at, validation, "o", markersize=5, color=style["color"], clip_on=False)
        rate = "no rate given" if run.learning_rate is None else f"rate {run.learning_rate:g}"
        label = f"{run.label}, {rate}: {run.validation_loss:.3f}"
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
        if _curve(run, key) is not None:
            values = np.asarray(run.telemetry[key], dtype=np.float64)
            values = np.where(np.isfinite(values), values, np.nan)
            steps = np.arange(1, len(values) + 1)
            axes.plot(steps, values, linewidth=0.8, alpha=0.85, **STYLES[run.optimizer])
    if key == "learning_rate":
        rates = [curve for curve in (_curve(run, key) for run in runs) if curve is not None]
        if rates and np.concatenate(rates).min() > 0:
            axes.set_yscale("log")
    if key == "alignment":
        axes.axhline(-0.25, color="#888888", linewidth=0.8, linestyle=":")
