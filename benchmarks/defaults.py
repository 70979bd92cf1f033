"""Nothing tuned: every optimizer at the rate that it comes with."""

import argparse
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks._comparison import Comparison, add_arguments, final, split
from benchmarks._protocol import Protocol, Rows
from benchmarks._standings import cells, draw, named, ranked, standing
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
    reference = comparison.named(REFERENCE)
    names = list(dict.fromkeys([reference, *comparison.optimizers]))
    rates = {name: entry(*split(name)).default for name in names}
    records = comparison.at_rates(rates, comparison.seeds)
    losses = {name: final(by_seed) for name, by_seed in records.items()}
    rows = {
        name: standing(name, rates[name], losses[name], losses[reference])
        | {
            "by_seed": [*losses[name].values()],
            "state_bytes": next(iter(records[name].values())).state_bytes_per_parameter,
        }
        for name in names
    }
    return comparison.described() | {"optimizers": rows}


def _rows(result: dict[str, Any]) -> Rows:
    reference = named(result, REFERENCE)
    return Rows(
        ("optimizer", "rate", "held-out loss", "minus self-driving, paired", "bytes a parameter"),
        [
            (row["label"], f"{row['rate']:g}", *cells(row, reference), f"{row['state_bytes']:.1f}")
            for row in ranked(result)
        ],
    )


def _draw(result: dict[str, Any]) -> Figure:
    return draw(result, "nothing tuned")


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
