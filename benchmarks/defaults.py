"""Nothing tuned: every optimizer at the rate that it comes with."""

import argparse
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks._comparison import Comparison, add_arguments, final, label, split
from benchmarks._plots import dots, one_panel
from benchmarks._protocol import Protocol, Rows
from benchmarks._statistics import mean, paired
from benchmarks._sweep import entry

OPTIMIZERS = (
    "self_driving",
    "self_driving-lion",
    "scheduled",
    "meta3",
    "adamw",
    "adamw-cosine",
    "schedule-free",
    "schedule-free-plus",
    "prodigy",
    "prodigy-cosine",
    "d-adaptation",
    "d-adaptation-cosine",
    "mechanic",
    "mechanic-cosine",
    "momo",
    "dog",
    "emosens",
)
REFERENCE = "self_driving"


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, optimizers=OPTIMIZERS)


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    comparison = Comparison(options, console)
    names = list(dict.fromkeys([REFERENCE, *options.optimizer]))
    rates = {name: entry(*split(name)).default for name in names}
    tasks = {
        (name, seed): comparison.task(name, rates[name], seed)
        for name in names
        for seed in comparison.seeds
    }
    runs = comparison.run(tasks.values())
    records = {name: {seed: runs[tasks[name, seed]] for seed in comparison.seeds} for name in names}
    losses = {name: final(by_seed) for name, by_seed in records.items()}
    rows = {}
    for name in names:
        at_end, difference = mean([*losses[name].values()]), paired(losses[name], losses[REFERENCE])
        rows[name] = {
            "label": label(name),
            "rate": rates[name],
            "loss": at_end.mean,
            "error": at_end.error,
            "difference": difference.mean,
            "difference_error": difference.error,
            "state_bytes": records[name][0].state_bytes_per_parameter,
        }
    return comparison.described() | {"optimizers": rows}


def _rows(result: dict[str, Any]) -> Rows:
    ordered = sorted(result["optimizers"].values(), key=lambda row: row["loss"])
    return Rows(
        ("optimizer", "rate", "held-out loss", "minus self-driving, paired", "bytes a parameter"),
        [
            (
                row["label"],
                f"{row['rate']:g}",
                f"{row['loss']:.3f} \u00b1 {row['error'] or 0.0:.3f}",
                f"{row['difference']:+.3f} \u00b1 {row['difference_error'] or 0.0:.3f}",
                f"{row['state_bytes']:.1f}",
            )
            for row in ordered
        ],
    )


def _draw(result: dict[str, Any]) -> Figure:
    work = result["workload"]
    figure, axes = one_panel(f"{work['name']}, {work['steps']:,} steps, nothing tuned")
    ordered = sorted(result["optimizers"].values(), key=lambda row: row["loss"])
    dots(axes, [(row["label"], row["loss"], row["error"]) for row in ordered], work["unit"])
    return figure


PROTOCOL = Protocol(
    name="defaults",
    title="Nothing tuned.",
    reading=(
        "Each optimizer runs once a seed at the rate that it comes with, which for most that look "
        "for their rate themselves is 1, and for Adam PyTorch's 1e-3. Those with a cosine know the "
        "number of steps, the others do not."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
