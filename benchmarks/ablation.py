"""What each part of Meta3 is worth: one removed at a time, at the same rates."""

import argparse
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks._comparison import Comparison, add_arguments, curve, final, label, rates
from benchmarks._our_optimizers import ABLATION
from benchmarks._plots import dots, one_panel
from benchmarks._protocol import Protocol, Rows
from benchmarks._statistics import mean, paired

WHOLE = "meta3"


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, optimizers=tuple(ABLATION))


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    comparison = Comparison(options, console)
    whole = comparison.over_grid([WHOLE])[WHOLE]
    grid, best = rates(WHOLE), curve(whole).best_rate
    # A part may only shift the best rate, so each variant may also take a neighbouring one.
    middle = min(max(grid.index(best), 1), len(grid) - 2)
    near = grid[middle - 1 : middle + 2]
    tasks = {
        (name, rate, seed): comparison.task(name, rate, seed)
        for name in options.optimizer
        for rate in near
        for seed in comparison.seeds
    }
    runs = comparison.run(tasks.values())
    reference = {rate: final(whole[rate]) for rate in near}
    rows = {WHOLE: _row(WHOLE, reference, reference, best)}
    for name in options.optimizer:
        losses = {
            rate: final({seed: runs[tasks[name, rate, seed]] for seed in comparison.seeds})
            for rate in near
        }
        rows[name] = _row(name, losses, reference, best)
    return comparison.described() | {
        "grid": {name: list(near) for name in rows},
        "optimizers": rows,
    }


def _row(
    name: str,
    losses: dict[float, dict[int, float]],
    reference: dict[float, dict[int, float]],
    best: float,
) -> dict[str, Any]:
    means = {rate: mean([*by_seed.values()]).mean for rate, by_seed in losses.items()}
    own = min(means, key=lambda rate: means[rate])
    same, at_own = paired(losses[best], reference[best]), paired(losses[own], reference[best])
    return {
        "label": label(name),
        "loss_at_same_rate": means[best],
        "difference_at_same_rate": same.mean,
        "error_at_same_rate": same.error,
        "own_rate": own,
        "difference_at_own_rate": at_own.mean,
        "error_at_own_rate": at_own.error,
    }


def _rows(result: dict[str, Any]) -> Rows:
    def cell(row: dict[str, Any], where: str) -> str:
        value, error = row[f"difference_at_{where}_rate"], row[f"error_at_{where}_rate"] or 0.0
        return f"{value:+.3f} \u00b1 {error:.3f}"

    return Rows(
        ("variant", "loss", "worse by, at the same rate", "own best rate", "worse by, at its own"),
        [
            (
                row["label"],
                f"{row['loss_at_same_rate']:.3f}",
                cell(row, "same"),
                f"{row['own_rate']:g}",
                cell(row, "own"),
            )
            for row in result["optimizers"].values()
        ],
    )


def _draw(result: dict[str, Any]) -> Figure:
    work = result["workload"]
    figure, axes = one_panel(f"{work['name']}: Meta3 with one part removed")
    rows = [
        (row["label"], row["difference_at_own_rate"], row["error_at_own_rate"])
        for row in result["optimizers"].values()
    ]
    dots(axes, rows, "held-out loss above the whole's")
    axes.axvline(0.0, color="0.6", linewidth=1)
    return figure


PROTOCOL = Protocol(
    name="ablation",
    title="Meta3 with one part removed at a time.",
    reading=(
        "The whole runs at its best rate of the grid; every variant at that rate and its two "
        "neighbours. A positive difference, paired by seed, is what the part is worth; one within "
        "its error of zero says that the part is worth nothing here."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
