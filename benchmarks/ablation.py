"""What each part and constant is worth: one changed at a time, at the same rates."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks._comparison import Comparison, add_arguments, curve, final, label, rates
from benchmarks._frameworks import room
from benchmarks._plots import dots, one_panel
from benchmarks._protocol import Protocol, Rows
from benchmarks._statistics import mean, paired

VARIANTS = {"meta3": "ABLATION", "self_driving": "VARIED", "self_driving-muon": "VARIED_MUON"}
"""What is taken apart, and the name of its variants in JAX's registry."""

START = 1e-3
"""Where an optimizer that finds its rate itself starts to look."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_whole(parser, VARIANTS, "taken apart")


def add_whole(parser: argparse.ArgumentParser, wholes: Iterable[str], what: str) -> None:
    """Adds the options of a benchmark that compares variants with what they are variants of.

    Args:
        parser: where they go.
        wholes: what there may be variants of; the default is `meta3`.
        what: the help for it.
    """
    add_arguments(parser, optimizers=None)
    parser.add_argument(
        "--whole", choices=wholes, default="meta3", help=f"{what} (default: %(default)s)"
    )
    parser.add_argument(
        "--rate", type=float, help="the only rate to compare at; default: those near the best one"
    )


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    options.optimizer = options.optimizer or _variants(options)
    comparison = Comparison(options, console)
    whole, variants = comparison.named(options.whole), comparison.optimizers
    near, best = _rates_to_compare_at(comparison, whole, options)
    tasks = {
        (name, rate, seed): comparison.task(name, rate, seed)
        for name in (whole, *variants)
        for rate in near
        for seed in comparison.seeds
    }
    runs = comparison.run(tasks.values())
    losses = {
        name: {
            rate: final({seed: runs[tasks[name, rate, seed]] for seed in comparison.seeds})
            for rate in near
        }
        for name in (whole, *variants)
    }
    rows = {name: _row(name, at, losses[whole], best) for name, at in losses.items()}
    described = comparison.described()
    return described | {
        "part": f"{described['part']}-{options.whole}",
        "whole": whole,
        "grid": {} if options.rate else {whole: list(rates(whole))},
        "rates": list(near),
        "optimizers": rows,
    }


def _variants(options: argparse.Namespace) -> list[str]:
    """Every variant of what is taken apart."""
    if options.framework != "jax":
        raise ValueError(
            f"--optimizer must name the variants to compare with --framework {options.framework}, "
            "such as meta3-8bit, got none; those of single parts are in JAX alone."
        )
    return [*getattr(room("jax", "variants", "ablation"), VARIANTS[options.whole])]


def _rates_to_compare_at(
    comparison: Comparison, whole: str, options: argparse.Namespace
) -> tuple[tuple[float, ...], float]:
    """The rates near the best one, since a part may only shift it, and the best one."""
    only = options.rate
    if only is None and options.whole.startswith("self_driving"):
        only = START
    if only is not None:
        return (only,), only
    grid, best = rates(whole), curve(comparison.over_grid([whole])[whole]).best_rate
    middle = min(max(grid.index(best), 1), len(grid) - 2)
    return grid[middle - 1 : middle + 2], best


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
        "by_seed": [*losses[best].values()],
    }


def _rows(result: dict[str, Any]) -> Rows:
    def cell(row: dict[str, Any], where: str) -> str:
        value, error = row[f"difference_at_{where}_rate"], row[f"error_at_{where}_rate"] or 0.0
        return f"{value:+.3f} \u00b1 {error:.3f}"

    headers = ["variant", "loss", "worse by, at the same rate"]
    rows = [
        [row["label"], f"{row['loss_at_same_rate']:.3f}", cell(row, "same")]
        for row in result["optimizers"].values()
    ]
    if all("by_seed" in row for row in result["optimizers"].values()):
        headers.insert(2, "worst seed")
        for cells, row in zip(rows, result["optimizers"].values(), strict=True):
            cells.insert(2, f"{max(row['by_seed']):.3f}")
    if len(result["rates"]) > 1:
        headers += ["own best rate", "worse by, at its own"]
        for cells, row in zip(rows, result["optimizers"].values(), strict=True):
            cells += [f"{row['own_rate']:g}", cell(row, "own")]
    return Rows(headers, rows)


def _draw(result: dict[str, Any]) -> Figure:
    work = result["workload"]
    whole = result["optimizers"][result["whole"]]["label"]
    figure, axes = one_panel(f"{work['name']}: {whole} with one thing changed")
    rows = [
        (row["label"], row["difference_at_own_rate"], row["error_at_own_rate"])
        for row in result["optimizers"].values()
    ]
    dots(axes, rows, "held-out loss above the whole's")
    axes.axvline(0.0, color="0.6", linewidth=1)
    return figure


PROTOCOL = Protocol(
    name="ablation",
    title="One part removed, or one constant changed, at a time.",
    reading=(
        "Meta3 runs at its best rate of the grid, every variant at that rate and its two "
        "neighbours, or all at the one rate that is given. Self-driving and its variants start at "
        "1e-3. A positive difference, paired by "
        "seed, is what the part is worth; one within its error of zero says that the part is worth "
        "nothing here."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)


def among(wholes: Mapping[str, Sequence[str]], what: str, *, workload: str, seeds: int) -> Protocol:
    """The same for variants that are listed, on seeds that nothing was chosen on.

    Args:
        wholes: the variants of each form of self-driving; the first form is the default.
        what: the help for the choice.
        workload: the default one.
        seeds: how many by default.
    """

    def arguments(parser: argparse.ArgumentParser) -> None:
        add_arguments(parser, optimizers=None, workload=workload, seeds=seeds, first_seed=3)
        first = next(iter(wholes))
        parser.add_argument(
            "--whole", choices=wholes, default=first, help=f"{what} (default: %(default)s)"
        )
        parser.set_defaults(rate=None)

    def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
        options.optimizer = options.optimizer or [*wholes[options.whole]]
        return _measure(options, console)

    return PROTOCOL._replace(arguments=arguments, measure=measure)
