"""One run that does not know its end, against a cosine trained anew for every end."""

import argparse
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks._comparison import Comparison, add_arguments, curve, label, rates
from benchmarks._plots import legend, one_panel, styles
from benchmarks._protocol import Protocol, Rows
from benchmarks._statistics import capped, mean

OPTIMIZERS = ("self_driving", "meta3", "meta_lion", "adamw", "schedule-free")
REFERENCE = "adamw-cosine"


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, optimizers=OPTIMIZERS)


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    comparison = Comparison(options, console)
    reference = comparison.named(REFERENCE)
    names = list(dict.fromkeys([reference, *comparison.optimizers]))
    quarter = comparison.steps // 4
    ends = tuple(factor * quarter for factor in (1, 2, 4, 8))
    best = {name: curve(runs).best_rate for name, runs in comparison.over_grid(names).items()}
    # One task for each end of the cosine; one for all ends of the others.
    tasks = {
        (name, seed): [
            comparison.task(name, best[name], seed, steps=last, evaluate_at=at)
            for last, at in (
                [(end, (end,)) for end in ends] if name == reference else [(ends[-1], ends)]
            )
        ]
        for name in names
        for seed in comparison.seeds
    }
    runs = comparison.run(task for several in tasks.values() for task in several)
    rows: dict[str, Any] = {}
    for name in names:
        by_seed = []
        for seed in comparison.seeds:
            records = [runs[task] for task in tasks[name, seed]]
            by_seed.append([capped(x, r.start) for r in records for x in r.held_out])
        means = [mean(at_end) for at_end in zip(*by_seed, strict=True)]
        rows[name] = {
            "label": label(name) + (", trained anew for each" if name == reference else ""),
            "rate": best[name],
            "losses": [value.mean for value in means],
            "errors": [value.error for value in means],
        }
    return comparison.described() | {
        "grid": {name: list(rates(name)) for name in names},
        "ends": list(ends),
        "optimizers": rows,
    }


def _rows(result: dict[str, Any]) -> Rows:
    return Rows(
        ("optimizer", "rate", *(f"after {end:,}" for end in result["ends"])),
        [
            (
                row["label"],
                f"{row['rate']:g}",
                *(
                    f"{loss:.3f} \u00b1 {error or 0.0:.3f}"
                    for loss, error in zip(row["losses"], row["errors"], strict=True)
                ),
            )
            for row in result["optimizers"].values()
        ],
    )


def _draw(result: dict[str, Any]) -> Figure:
    figure, axes = one_panel(f"{result['workload']['name']}: evaluated on the way")
    look = styles(result["optimizers"])
    for name, row in result["optimizers"].items():
        errors = [error or 0.0 for error in row["errors"]]
        axes.errorbar(
            result["ends"], row["losses"], yerr=errors, label=row["label"], capsize=3, **look[name]
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(result["ends"], [f"{end:,}" for end in result["ends"]])
    axes.set_xlabel("steps")
    axes.set_ylabel(result["workload"]["unit"])
    legend(axes)
    return figure


PROTOCOL = Protocol(
    name="anytime",
    title="One run without a horizon, evaluated on the way.",
    reading=(
        "T is the workload's budget. Rates are those that are best at T. The cosine is run anew "
        "for each of T/4, T/2, T and 2T; the others are one run of 2T."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
