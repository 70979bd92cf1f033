"""Optimizers at the rates that carry-over chose, on more seeds than chose them."""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import carry_over
from benchmarks._comparison import Comparison, add_arguments, final
from benchmarks._protocol import OUTPUT, Protocol, Rows
from benchmarks._standings import cells, draw, named, ranked, standing

REFERENCE = "adamw-cosine"
OPTIMIZERS = (*carry_over.OPTIMIZERS, *carry_over.RIVALS)


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, optimizers=OPTIMIZERS, workload="digits-conv", seeds=8, first_seed=6)
    parser.add_argument(
        "--input",
        type=Path,
        default=OUTPUT,
        help="directory with the figures of carry-over (default: %(default)s)",
    )


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    comparison = Comparison(options, console)
    described = comparison.described()
    tuned = _tuned(options.input / f"carry-over-{described['part']}.json")
    again = sorted(set(tuned["seeds"]).intersection(comparison.seeds))
    if again:
        raise ValueError(
            f"--first-seed must leave out the seeds that chose the rates, got {again} again; "
            f"begin at {max(tuned['seeds']) + 1}."
        )
    reference = comparison.named(REFERENCE)
    # Who is compared by default has to be in the table; who is asked for must be.
    names = [
        name
        for name in dict.fromkeys([reference, *comparison.optimizers])
        if options.optimizer or name in tuned["optimizers"]
    ]
    missing = [name for name in names if name not in tuned["optimizers"]]
    if missing:
        raise ValueError(
            f"--input must hold the best rate of {', '.join(missing)}, got figures of "
            f"{', '.join(tuned['optimizers'])}; run {tuned['command']} with it."
        )
    rates = {name: tuned["optimizers"][name]["best_rate"] for name in names}
    losses = {
        name: final(records)
        for name, records in comparison.at_rates(rates, comparison.seeds).items()
    }
    return described | {
        "tuning_seeds": tuned["seeds"],
        "grid": {name: [rate] for name, rate in rates.items()},
        "optimizers": {
            name: standing(name, rates[name], own, losses[reference])
            | {"best_rate": rates[name], "by_seed": [list(own.values())]}
            for name, own in losses.items()
        },
    }


def _tuned(path: Path) -> dict[str, Any]:
    """The figures that hold the rates.

    Raises:
        ValueError: if there are none.
    """
    if not path.is_file():
        raise ValueError(
            f"--input must hold {path.name}, got {path.parent}; run python -m benchmarks "
            "carry-over with the same workload, or name docs/evidence."
        )
    return json.loads(path.read_text())


def _rows(result: dict[str, Any]) -> Rows:
    reference = named(result, REFERENCE)
    return Rows(
        ("optimizer", "rate", "held-out loss", f"minus {REFERENCE}, paired by seed"),
        [(row["label"], f"{row['rate']:g}", *cells(row, reference)) for row in ranked(result)],
    )


def _draw(result: dict[str, Any]) -> Figure:
    return draw(result, f"{len(result['seeds'])} fresh seeds")


PROTOCOL = Protocol(
    name="fresh-seeds",
    title="The rates of carry-over on fresh seeds.",
    reading=(
        "Where three seeds cannot tell: every optimizer at the rate that carry-over found best for "
        "it, on seeds that chose nothing. Self-driving starts where it comes with."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
