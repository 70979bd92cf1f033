"""Table 1 of the Cruxy paper in its own setting, by several seeds and on held-out text."""

import argparse
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks._comparison import Comparison, add_arguments, curve, label, rates
from benchmarks._plots import COLORS, dots, finish
from benchmarks._protocol import Protocol, Rows
from benchmarks._runs import Record
from benchmarks._statistics import mean, paired

PUBLISHED = {"adamw": 5e-3, "meta3": 5e-3, "meta_lion-paper": 1e-3}
"""The paper's rates; its weight decays and betas are the registry's."""

TUNED = ("adamw", "adamw-cosine")
"""What the paper leaves out: AdamW at its own best rate, constant and with a schedule."""

UNTUNED = {"self_driving": 1e-3}
"""What finds its rate itself, from its default start."""

KINDS = {"published": "published rate", "tuned": "best rate", "untuned": "no rate"}

REFERENCE = "adamw published"


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, optimizers=TUNED, workload="shakespeare-paper", seeds=5)
    parser.add_argument(
        "--tuning-seeds",
        type=int,
        choices=range(1, 6),
        default=1,
        help="seeds on which the tuned rates are chosen (default: %(default)s)",
    )


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    comparison = Comparison(options, console)
    tuning = tuple(range(options.tuning_seeds))
    chosen = {f"{n} published": (comparison.named(n), rate) for n, rate in PUBLISHED.items()}
    untuned = {f"{n} untuned": (comparison.named(n), rate) for n, rate in UNTUNED.items()}
    grids = comparison.over_grid(comparison.optimizers, tuning)
    for name, by_rate in grids.items():
        chosen[f"{name} tuned"] = name, curve(by_rate).best_rate
    chosen |= untuned
    tasks = {
        (row, seed): comparison.task(name, rate, seed)
        for row, (name, rate) in chosen.items()
        for seed in comparison.seeds
    }
    runs = comparison.run(tasks.values())
    figures: dict[str, Any] = {}
    for row, (name, rate) in chosen.items():
        records = {seed: runs[tasks[row, seed]] for seed in comparison.seeds}
        references = {seed: runs[tasks[REFERENCE, seed]] for seed in comparison.seeds}
        figures[row] = {
            "label": f"{label(name)}, {KINDS[row.rpartition(' ')[2]]}",
            "rate": rate,
            "training": _compared(records, references, Record.final_training_loss),
            "held_out": _compared(records, references, lambda record: record.held_out[-1]),
        }
    return comparison.described() | {
        "grid": {name: list(rates(name)) for name in comparison.optimizers},
        "tuning_seeds": list(tuning),
        "optimizers": figures,
    }


def _compared(
    records: dict[int, Record], references: dict[int, Record], of: Callable[[Record], float]
) -> dict[str, float]:
    values = {seed: of(record) for seed, record in records.items()}
    own = mean([*values.values()])
    difference = paired(values, {seed: of(record) for seed, record in references.items()})
    return {
        "loss": own.mean,
        "error": own.error,
        "difference": difference.mean,
        "difference_error": difference.error,
    }


def _rows(result: dict[str, Any]) -> Rows:
    def cells(figures: dict[str, float]) -> tuple[str, str]:
        return (
            f"{figures['loss']:.3f} \u00b1 {figures['error'] or 0.0:.3f}",
            f"{figures['difference']:+.3f} \u00b1 {figures['difference_error'] or 0.0:.3f}",
        )

    against = "minus AdamW published"
    return Rows(
        ("optimizer", "rate", "training, last 50 steps", against, "held out", against),
        [
            (row["label"], f"{row['rate']:g}", *cells(row["training"]), *cells(row["held_out"]))
            for row in result["optimizers"].values()
        ],
    )


def _draw(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.add_subplot()
    finish(axes, f"The paper's setting, {len(result['seeds'])} seeds")
    rows = [*result["optimizers"].values()]
    dots(
        axes,
        [(row["label"], row["held_out"]["loss"], row["held_out"]["error"]) for row in rows],
        result["workload"]["unit"],
    )
    for place, row in enumerate(rows):
        loss, error = row["training"]["loss"], row["training"]["error"] or 0.0
        axes.errorbar(loss, place, xerr=error, fmt="s", color=COLORS[1], capsize=3, alpha=0.8)
    axes.plot([], [], "o", color=COLORS[0], label="held out")
    axes.plot([], [], "s", color=COLORS[1], label="training, last 50 steps")
    axes.legend(frameon=False)
    return figure


PROTOCOL = Protocol(
    name="paper-table",
    title="The paper's Table 1 again.",
    reading=(
        "The paper reports the training loss of one batch of one run. Here: the mean of the last "
        "50 steps and the held-out loss, means over seeds with standard errors, differences paired "
        "by seed. The paper's claim is that Meta3 ends 0.043 below AdamW, both at rate 5e-3. Below "
        "it AdamW at the best rate of its grid, constant and with warm-up and cosine, and the "
        "self-driving optimizer, of which nothing is tuned."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
