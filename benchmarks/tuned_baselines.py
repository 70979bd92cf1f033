"""Everybody at their best: the rate tuned with the same number of trials, then fresh seeds."""

import argparse
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks._comparison import Comparison, add_arguments, curve, final, rates
from benchmarks._protocol import Protocol, Rows
from benchmarks._standings import cells, draw, named, ranked, standing

OPTIMIZERS = (
    "self_driving",
    "self_driving-lion",
    "scheduled",
    "meta3",
    "meta_lion",
    "adamw",
    "adamw-cosine",
    "lion-cosine",
    "schedule-free",
    "prodigy",
    "muon-cosine",
)
REFERENCE = "adamw-cosine"


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, optimizers=OPTIMIZERS)


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    comparison = Comparison(options, console)
    reference = comparison.named(REFERENCE)
    names = list(dict.fromkeys([reference, *comparison.optimizers]))
    best = {name: curve(runs) for name, runs in comparison.over_grid(names).items()}
    fresh = tuple(seed + options.seeds for seed in comparison.seeds)
    records = comparison.at_rates({name: best[name].best_rate for name in names}, fresh)
    losses = {name: final(by_seed) for name, by_seed in records.items()}
    rows = {
        name: standing(name, best[name].best_rate, losses[name], losses[reference])
        | {"at_edge": best[name].at_edge}
        for name in names
    }
    return comparison.described() | {
        "grid": {name: list(rates(name)) for name in names},
        "fresh_seeds": list(fresh),
        "optimizers": rows,
    }


def _rows(result: dict[str, Any]) -> Rows:
    reference = named(result, REFERENCE)
    return Rows(
        ("optimizer", "tuned rate", "held-out loss", f"minus {REFERENCE}, paired by seed"),
        [
            (
                row["label"],
                f"{row['rate']:g}" + (" (edge)" if row["at_edge"] else ""),
                *cells(row, reference),
            )
            for row in ranked(result)
        ],
    )


def _draw(result: dict[str, Any]) -> Figure:
    return draw(result, "everybody tuned alike")


PROTOCOL = Protocol(
    name="tuned-baselines",
    title="Every optimizer at its best rate.",
    reading=(
        "The rate of each is chosen from its own grid of seven by the mean held-out loss over the "
        "first seeds; the figures are then taken with as many fresh ones. Compared at the end of "
        "the budget only, which is where a schedule is best."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
