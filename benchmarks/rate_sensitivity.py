"""How much the learning rate matters: `l*` and `S` of every optimizer over a grid of rates."""

import argparse
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks._comparison import Comparison, add_arguments, add_rates, curve, final, label
from benchmarks._plots import legend, one_panel, styles
from benchmarks._protocol import Protocol, Rows
from benchmarks._statistics import mean

OPTIMIZERS = (
    "self_driving",
    "self_driving-lion",
    "scheduled",
    "meta3",
    "meta_lion",
    "stability_v1",
    "stability_v2",
    "adamw",
    "adamw-cosine",
    "adamw-wsd",
    "lion-cosine",
    "schedule-free",
    "prodigy",
    "prodigy-cosine",
    "muon-cosine",
    "dog",
)

NOTHING = 1e-6
"""A loss below this is one of 0, but for rounding."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, optimizers=OPTIMIZERS)
    add_rates(parser)


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    comparison = Comparison(options, console)
    grid = comparison.over_grid(comparison.optimizers)
    found: dict[str, Any] = {}
    for name, by_rate in grid.items():
        by_seed = {rate: list(final(records).values()) for rate, records in by_rate.items()}
        losses = {rate: mean(values) for rate, values in by_seed.items()}
        diverged = {
            rate: sum(not np.isfinite(r.held_out[-1]) for r in records.values())
            for rate, records in by_rate.items()
        }
        at_best = curve(by_rate)
        found[name] = {
            "label": label(name),
            "best": at_best.best,
            "best_error": losses[at_best.best_rate].error,
            "best_rate": at_best.best_rate,
            "at_edge": at_best.at_edge,
            "sensitivity": at_best.sensitivity,
            "losses": [value.mean for value in losses.values()],
            "errors": [value.error for value in losses.values()],
            "by_seed": list(by_seed.values()),
            "diverged": list(diverged.values()),
        }
    first = grid[comparison.optimizers[0]]
    starts = [record.start for records in first.values() for record in records.values()]
    return comparison.described() | {
        "grid": {name: list(by_rate) for name, by_rate in grid.items()},
        "start": float(np.mean(starts)),
        "optimizers": found,
    }


def _rows(result: dict[str, Any]) -> Rows:
    ordered = sorted(result["optimizers"].values(), key=lambda row: row["best"])
    return Rows(
        ("optimizer", "best held-out loss l*", "at rate", "sensitivity S", "diverged runs"),
        [
            (
                row["label"],
                f"{row['best']:.3f} \u00b1 {row['best_error'] or 0.0:.3f}",
                f"{row['best_rate']:g}" + (" (edge)" if row["at_edge"] else ""),
                f"{row['sensitivity']:.3f}",
                f"{sum(row['diverged'])} of {len(row['losses']) * len(result['seeds'])}",
            )
            for row in ordered
        ],
    )


def _draw(result: dict[str, Any]) -> Figure:
    work = result["workload"]
    rows = result["optimizers"]
    figure, axes = one_panel(f"{work['name']}, {work['steps']:,} steps", len(rows))
    look = styles(rows)
    for name, row in rows.items():
        grid = np.array(result["grid"][name])
        centre = grid[len(grid) // 2]
        axes.errorbar(
            grid / centre,
            row["losses"],
            yerr=[error or 0.0 for error in row["errors"]],
            label=f"{row['label']} (1 = {centre:g})",
            linewidth=1.2,
            markersize=4,
            capsize=2,
            **look[name],
        )
        if len(grid) == 1:  # it starts where it comes with
            own = {key: look[name][key] for key in ("color", "linestyle")}
            axes.axhline(row["losses"][0], linewidth=0.8, **own)
    axes.set_xscale("log")
    axes.set_xlabel("rate, relative to the middle of the optimizer's grid")
    axes.set_ylabel(work["unit"])
    bests = [row["best"] for row in rows.values()]
    # A share that can be missed altogether has no logarithm.
    if result["start"] > 10 * min(bests) > 10 * NOTHING:
        axes.set_yscale("log")
        axes.set_ylim(0.8 * min(bests), result["start"])
    else:
        top = max(loss for row in rows.values() for loss in row["losses"])
        margin = 0.05 * (top - min(bests)) or 0.05
        axes.set_ylim(min(bests) - margin, top + margin)
    legend(axes)
    return figure


PROTOCOL = Protocol(
    name="rate-sensitivity",
    title="Learning-rate sensitivity.",
    reading=(
        "Every optimizer is run at seven rates over three decades, the self-driving ones from "
        "seven starts between 1e-6 and 10. l* is its lowest held-out loss, "
        "S the mean over the rates of what the loss lies above l*, with a run that diverged or got "
        "worse counted as not trained at all (Wortsman et al. 2023, arXiv:2309.14322). Read both: "
        "a bad optimizer can be insensitive."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
