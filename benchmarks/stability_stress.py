"""Bad batches at fixed steps: what they cost at the end, and how long the recovery takes."""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks._comparison import Comparison, add_arguments, curve, final, label, rates, split
from benchmarks._frameworks import room
from benchmarks._plots import finish, legend, styles
from benchmarks._protocol import Protocol, Rows
from benchmarks._runs import Record
from benchmarks._statistics import mean, paired
from benchmarks.faults import FAULTS

OPTIMIZERS = ("self_driving", "meta3", "meta_lion", "adamw", "adamw-if-finite", "adamw-clipped")

# A run has recovered where its training loss, over so many steps, is this near to the clean run's.
WINDOW, NEAR = 20, 0.05


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, optimizers=OPTIMIZERS)
    parser.add_argument(
        "--fault",
        nargs="+",
        choices=[name for name in FAULTS if name != "none"],
        default=[name for name in FAULTS if name != "none"],
        help="default: all",
    )


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    comparison = Comparison(options, console)
    names = comparison.optimizers
    for name in names:
        if split(name)[0] != "jax":
            raise ValueError(f"bad batches strike in JAX alone, got {name}; leave it out.")
    # What only guards AdamW runs at AdamW's best rate.
    guards = room("jax", "optimizers", "stability-stress").GUARDED_PEERS
    tuned = {name: "adamw" if name in guards else name for name in names}
    grids = comparison.over_grid(dict.fromkeys(tuned.values()))
    best = {name: curve(grids[base]).best_rate for name, base in tuned.items()}
    tasks = {
        (name, fault, seed): comparison.task(name, best[name], seed, fault=fault)
        for name in names
        for fault in ("none", *options.fault)
        for seed in comparison.seeds
    }
    runs = comparison.run(tasks.values())
    rows: dict[str, Any] = {}
    for name in names:
        clean = {seed: runs[tasks[name, "none", seed]] for seed in comparison.seeds}
        at_end = mean([*final(clean).values()])
        all_clean = [*clean.values()]
        if name in grids:
            all_clean = [r for records in grids[name].values() for r in records.values()]
        rows[name] = {
            "label": label(name),
            "rate": best[name],
            "clean": at_end.mean,
            "clean_error": at_end.error,
            "clean_steps": sum(len(record.losses) for record in all_clean),
            "false_skips": _total([record.skipped for record in all_clean]),
            "faults": {
                fault: _damage(
                    {seed: runs[tasks[name, fault, seed]] for seed in comparison.seeds},
                    clean,
                    FAULTS[fault].strikes(comparison.steps),
                )
                for fault in options.fault
            },
        }
    return comparison.described() | {
        "grid": {name: list(rates(name)) for name in grids},
        "fault_labels": {fault: FAULTS[fault].label for fault in options.fault},
        "strikes": {
            fault: list(FAULTS[fault].strikes(comparison.steps)) for fault in options.fault
        },
        "optimizers": rows,
    }


def _total(counts: Sequence[int | None]) -> int | None:
    """Their sum; `None` where there is no guard to count."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _damage(
    hit: Mapping[int, Record], clean: Mapping[int, Record], strikes: tuple[int, ...]
) -> dict[str, Any]:
    gap = paired(final(hit), final(clean))
    waits = [recovery(hit[seed].losses, clean[seed].losses, strikes) for seed in hit]
    return {
        "gap": gap.mean,
        "gap_error": gap.error,
        "recovery": None if None in waits else statistics.median(w for w in waits if w is not None),
        "skipped": [record.skipped for record in hit.values()],
        "finite": all(record.finite for record in hit.values()),
    }


def recovery(
    losses: tuple[float, ...], clean: tuple[float, ...], strikes: tuple[int, ...]
) -> int | None:
    """Steps after a strike until the training loss is near the clean run's again; the longest.

    Args:
        losses: of every step of the run that was hit.
        clean: of every step of the same run without the fault.
        strikes: the steps that were hit.

    Returns:
        `None` where it never comes near again, or not before the next strike.

    Examples:
        >>> recovery((1.0,) * 5 + (3.0,) * 4 + (1.0,) * 40, (1.0,) * 49, strikes=(4,))
        4
    """
    above = np.asarray(losses) - np.asarray(clean)
    firsts = [step for step in strikes if step - 1 not in strikes]
    longest = 0
    for first, end in zip(firsts, [*firsts[1:], len(above)], strict=True):
        after = above[first + 1 : end]
        spans = range(len(after) - WINDOW + 1)
        near = [i for i in spans if after[i : i + WINDOW].mean() <= NEAR]
        if not near:
            return None
        longest = max(longest, near[0])
    return longest


def _rows(result: dict[str, Any]) -> Rows:
    rows = []
    for row in result["optimizers"].values():
        skips = "no guard" if row["false_skips"] is None else str(row["false_skips"])
        clean = f"{row['clean']:.3f} \u00b1 {row['clean_error'] or 0.0:.3f}"
        counted = f"{skips} in {row['clean_steps']:,} steps"
        rows.append((row["label"], "clean", clean, "", "", counted, "yes"))
        for fault, damage in row["faults"].items():
            counts = damage["skipped"]
            never = damage["recovery"] is None
            rows.append(
                (
                    "",
                    result["fault_labels"][fault],
                    f"{row['clean'] + damage['gap']:.3f}",
                    f"{damage['gap']:+.3f} \u00b1 {damage['gap_error'] or 0.0:.3f}",
                    "never" if never else f"{damage['recovery']:.0f}",
                    "no guard" if None in counts else "/".join(map(str, counts)),
                    "yes" if damage["finite"] else "NO",
                )
            )
    headers = ("optimizer", "fault", "held-out loss", "minus its clean run", "steps to recover")
    return Rows((*headers, "skipped, by seed", "all finite"), rows)


def _draw(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(11.5, 5.2), layout="constrained")
    axes = figure.add_subplot()
    finish(axes, f"{result['workload']['name']}: what three bad batches cost")
    look = styles(result["optimizers"])
    faults = list(result["fault_labels"])
    for i, (name, row) in enumerate(result["optimizers"].items()):
        shift = 0.12 * (i - (len(result["optimizers"]) - 1) / 2)
        gaps = [row["faults"][fault]["gap"] for fault in faults]
        errors = [row["faults"][fault]["gap_error"] or 0.0 for fault in faults]
        places = np.arange(len(faults)) + shift
        style = {**look[name], "linestyle": "none"}
        axes.errorbar(places, gaps, yerr=errors, label=row["label"], capsize=2, **style)
    axes.axhline(0.0, color="0.6", linewidth=1)
    axes.set_yscale("symlog", linthresh=0.05)
    axes.set_xticks(range(len(faults)), [*result["fault_labels"].values()], rotation=20, ha="right")
    axes.set_ylabel("held-out loss above the clean run's")
    legend(axes)
    return figure


PROTOCOL = Protocol(
    name="stability-stress",
    title="Bad batches.",
    reading=(
        "Every fault strikes at two, four and six tenths of the run. The loss at the end is "
        "compared with the same run without the fault, paired by seed; a run that diverged counts "
        "as not trained. `Steps to recover` is the longest time, median over seeds, until the mean "
        f"training loss of {WINDOW} steps is within {NEAR} of the clean run's. False skips are "
        "counted over all clean runs of the whole grid of rates. What only guards AdamW runs at "
        "AdamW's best rate."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
