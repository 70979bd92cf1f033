"""Everybody on every workload: mean ranks, from figures that other benchmarks have left."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks._comparison import looks_for_its_rate, split
from benchmarks._frameworks import FRAMEWORKS, installed
from benchmarks._plots import dots, one_panel
from benchmarks._protocol import OUTPUT, Protocol, Rows
from benchmarks._statistics import mean
from benchmarks._sweep import entry

Losses = dict[str, list[float]]
"""Final figures of one workload by seed, by what is ranked."""

GRIDS, DEFAULTS = ("rate-sensitivity", "carry-over", "fresh-seeds"), "defaults"
"""The benchmarks whose figures are read: one of those with rates, and what comes by default."""

TUNED, UNTUNED = "tuned", "nothing tuned"


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        type=Path,
        default=OUTPUT,
        help="directory with the figures (default: %(default)s)",
    )
    parser.add_argument(
        "--grids",
        choices=GRIDS,
        default=GRIDS[0],
        help="the benchmark whose grids are read (default: %(default)s)",
    )
    parser.add_argument(
        "--workloads",
        nargs="+",
        metavar="PART",
        help="names of files without their beginnings, such as digits-conv; default: all there",
    )
    parser.add_argument(
        "--optimizer", nargs="+", metavar="NAME", help="default: those that are everywhere"
    )
    parser.add_argument(
        "--part", default="all", help="names the file of these figures (default: %(default)s)"
    )
    parser.set_defaults(framework=next(iter(installed()), next(iter(FRAMEWORKS))))


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    read = _read(options.input, options.workloads, options.grids)
    tables = {part: dict(_losses(files, options.grids)) for part, files in read.items()}
    several = [set(table) for table in tables.values()]
    names = sorted(set.intersection(*several))
    if options.optimizer:
        names = [name for name in names if name.partition(", ")[0] in options.optimizer]
    if len(names) < 2:
        raise ValueError(
            f"--input must hold at least two optimizers that {', '.join(tables)} have in common, "
            f"got {', '.join(names) or 'none'}; run the others on all of them."
        )
    left_out = sorted(set.union(*several) - set(names))
    if left_out:
        console.print(f"Not ranked: {', '.join(left_out)}.")
    tables = {part: {name: table[name] for name in names} for part, table in tables.items()}
    ranks = {part: ranked(_means(table)) for part, table in tables.items()}
    seeds = jackknifed(tables)
    figures = [file for files in read.values() for file in files.values()]
    commits = {file["environment"]["commit"] for file in figures}
    rows = {}
    for name in names:
        own = mean([ranks[part][name] for part in tables])
        optimizer, _, how = name.partition(", ")
        label = next(
            file["optimizers"][optimizer]["label"]
            for file in figures
            if optimizer in file["optimizers"]
        )
        rows[name] = {
            "label": label,
            "how": how,
            "rank": own.mean,
            "error": own.error,
            "error_over_seeds": seeds[name],
            "ranks": [ranks[part][name] for part in tables],
        }
    return {
        "part": options.part,
        "workloads": list(tables),
        "left_out": left_out,
        "commits": sorted(commits),
        "optimizers": rows,
    }


def _read(
    folder: Path, wanted: Sequence[str] | None, grids: str
) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures with grids, and of defaults where there are any, by part and benchmark.

    Raises:
        ValueError: if there are no figures, or not those wanted.
    """
    prefix = f"{grids}-"
    there = sorted(path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*.json"))
    missing = [part for part in wanted or () if part not in there]
    if missing or not there:
        raise ValueError(
            f"--input must hold figures of {', '.join(missing) or grids}, got {folder}; run "
            f"python -m benchmarks {grids}."
        )
    # The others have other seeds than defaults.
    names = (grids, DEFAULTS) if grids == GRIDS[0] else (grids,)
    paths = {
        part: {name: folder / f"{name}-{part}.json" for name in names} for part in wanted or there
    }
    return {
        part: {name: json.loads(path.read_text()) for name, path in own.items() if path.exists()}
        for part, own in paths.items()
    }


def _losses(
    files: Mapping[str, dict[str, Any]], benchmark: str
) -> Iterator[tuple[str, list[float]]]:
    """What is ranked on one workload, and its figures by seed.

    An optimizer at its best rate, unless it looks for its rate itself; and one at the rate that it
    comes with, from the grid where that is on it and else from the figures of `defaults`.
    """
    grids = files[benchmark]
    for name, row in grids["optimizers"].items():
        grid, default = grids["grid"][name], entry(*split(name)).default
        by_rate = dict(zip(grid, _by_seed(row, grids), strict=True))
        if not looks_for_its_rate(name):
            yield f"{name}, {TUNED}", by_rate[row["best_rate"]]
        if default in by_rate:
            yield f"{name}, {UNTUNED}", by_rate[default]
    if DEFAULTS in files:
        for name, row in files[DEFAULTS]["optimizers"].items():
            yield f"{name}, {UNTUNED}", _by_seed(row, files[DEFAULTS])


def _by_seed(row: Mapping[str, Any], result: Mapping[str, Any]) -> Any:
    if "by_seed" not in row:
        raise ValueError(
            f"--input must hold figures by seed, got those of {result['part']}, which hold means "
            f"alone; run {result['command']} again, which reuses finished runs."
        )
    return row["by_seed"]


def _means(table: Losses) -> dict[str, float]:
    return {name: float(np.mean(losses)) for name, losses in table.items()}


def ranked(losses: Mapping[str, float]) -> dict[str, float]:
    """Ranks from 1, the lowest loss first; what is equal shares the mean of its places.

    Examples:
        >>> ranked({"a": 2.0, "b": 1.0, "c": 2.0})
        {'a': 2.5, 'b': 1.0, 'c': 2.5}
    """
    values = np.array([*losses.values()])
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return dict(zip(losses, (below + (equal + 1) / 2).tolist(), strict=True))


def jackknifed(tables: Mapping[str, Losses]) -> dict[str, float]:
    """Standard errors of the mean ranks over seeds, the workloads held.

    Leaving out one seed of one workload at a time (the jackknife of a stratified sample): the sum
    over workloads of `(n - 1) / n` times the squared deviations of the mean rank. The best rate
    stays the one that all seeds chose.

    Args:
        tables: by workload; every one ranks the same, over at least two seeds.
    """
    total = dict.fromkeys(next(iter(tables.values())), 0.0)
    for table in tables.values():
        count = min(map(len, table.values()))
        without = [
            ranked(_means({name: [*own[:j], *own[j + 1 :]] for name, own in table.items()}))
            for j in range(count)
            if count > 1
        ]
        for name in total:
            ranks = np.array([ranks[name] for ranks in without] or [np.nan]) / len(tables)
            total[name] += (count - 1) / count * float(((ranks - ranks.mean()) ** 2).sum())
    return {name: variance**0.5 for name, variance in total.items()}


def _ordered(result: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(result["optimizers"].values(), key=lambda row: row["rank"])


def _rows(result: dict[str, Any]) -> Rows:
    return Rows(
        ("optimizer", "rate", "mean rank", "error over seeds", *result["workloads"]),
        [
            (
                row["label"],
                row["how"],
                f"{row['rank']:.1f} \u00b1 {row['error'] or 0.0:.1f}",
                f"{row['error_over_seeds'] or 0.0:.1f}",
                *(f"{rank:g}" for rank in row["ranks"]),
            )
            for row in _ordered(result)
        ],
    )


def _draw(result: dict[str, Any]) -> Figure:
    rows = _ordered(result)
    figure, axes = one_panel(f"mean rank over {len(result['workloads'])} workloads")
    figure.set_size_inches(9, 1.5 + 0.26 * len(rows))
    dots(
        axes,
        [(f"{row['label']}, {row['how']}", row["rank"], row["error"]) for row in rows],
        "mean rank, lower is better",
    )
    axes.set_xlabel("mean rank, lower is better; bars: standard error over workloads")
    return figure


PROTOCOL = Protocol(
    name="standings",
    title="Mean ranks over all workloads.",
    reading=(
        "From the figures of rate-sensitivity and defaults, of carry-over, or of fresh-seeds; "
        "nothing is trained. Tuned is an optimizer at the best rate of its grid, which is chosen "
        "on the seeds that rank it, and that is to its favour, but for fresh-seeds, where others "
        "choose it; with nothing tuned it has the rate that it comes with. Both kinds "
        "are ranked together on each workload, by the mean over its seeds. The error is the "
        "standard error over workloads; beside it that over seeds, by a jackknife that leaves out "
        "one seed of one workload at a time."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
