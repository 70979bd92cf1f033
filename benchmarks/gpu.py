"""Everything that is to be measured on a GPU, in one command, the most valuable first."""

import argparse
import os
import time
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks._apart import Apart, FailedError
from benchmarks._environment import basis
from benchmarks._finished import files, finished, keep, source_of
from benchmarks._frameworks import FRAMEWORKS, installed, room
from benchmarks._gpu_rows import FLOOR, GPU_SIZES, Row, measured, rows
from benchmarks._measured_optimizers import whole
from benchmarks._plots import COLORS, bars, finish
from benchmarks._protocol import Protocol, Rows

SIZES = ("100m", "1b", "10m")
SOURCES = (
    "cruxy_*/**/*.py",
    "cruxy_*/**/*.[ch]",
    "benchmarks/**/gpu.py",
    "benchmarks/_gpu_rows.py",
)
LONGEST = 240.0
"""Seconds of a row, after which it is given up."""
GRACE = 60.0
"""Seconds that the last row may take when time is up."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    there = installed() or [*FRAMEWORKS]
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="no row is begun after so many, and the last is given up a minute later; the same "
        "command goes on (default: %(default)s)",
    )
    parser.add_argument(
        "--sizes", nargs="+", choices=GPU_SIZES, default=list(SIZES), help="the first counts most"
    )
    parser.add_argument("--framework", nargs="+", choices=FRAMEWORKS, default=there)
    parser.add_argument(
        "--repeats", type=lambda text: whole(text, "--repeats", least=1), default=20
    )
    parser.add_argument(
        "--device",
        choices=("gpu", "cpu"),
        default="gpu",
        help="cpu tries the command where there is no GPU; its figures say nothing of one",
    )


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    # JAX would take three quarters of a GPU's memory before PyTorch gets any.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    frameworks = [name for name in FRAMEWORKS if name in options.framework][::-1]
    options.framework = frameworks  # PyTorch names the device
    if options.device == "gpu":
        missing = {name: room(name, "gpu", "gpu").there() for name in frameworks}
        frameworks = [name for name in frameworks if not missing[name]]
        if not frameworks:
            raise ValueError(
                f"there is no GPU to measure: {'; '.join(missing.values())}. Run this where there "
                "is one, or try the command with --device cpu --sizes tiny."
            )
    wanted = rows(options.sizes, frameworks)
    store = options.output / "gpu-rows.jsonl"
    source = source_of(
        files(SOURCES, "gpu"), [[basis(name) for name in frameworks], options.repeats]
    )
    done = {_row(found).key: found for found in finished(store, source)}
    left = [row for row in wanted if row.key not in done]
    end, framework = time.monotonic() + 60.0 * options.minutes, ""
    with Apart() as apart:
        for number, row in enumerate(left, 1):
            start = time.monotonic()
            if start > end:
                count = len(left) - number + 1
                console.print(f"{count} rows are left; the same command goes on.")
                break
            if row.framework != framework:  # each gives its memory back only with its process
                apart.end()
                framework = row.framework
            longest = min(LONGEST, end + GRACE - start)
            try:
                found = apart.call(longest, measured, row, options.repeats)
            except FailedError as error:  # a row that fails is a row that says so
                found = {"failed": str(error)}
            if found.get("error"):  # a capture that broke off may spoil what follows
                apart.end()
            done[row.key] = {**row._asdict(), **found, "took": time.monotonic() - start}
            keep(store, source, done[row.key])
            shown = found.get("failed") or ", ".join(f"{k} {_short(v)}" for k, v in found.items())
            console.print(f"[{number}/{len(left)}] {row.key}: {shown}", markup=False)
    return {
        "part": "-".join([*options.sizes, options.device]),
        "device": options.device,
        "rows": [done[row.key] for row in wanted if row.key in done],
        "left": [row.key for row in wanted if row.key not in done],
    }


def _row(found: dict[str, Any]) -> Row:
    return Row(**{name: found[name] for name in Row._fields})


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rows(result: dict[str, Any]) -> Rows:
    headers = (
        "what", "framework", "parameters", "ms", "host ms", "graph ms", "ratio to AdamW", "floor",
        "B/param moved", "of copy", "launches", "B/param kept", "said",
    )  # fmt: skip
    found, of = [], {_key(row): row for row in result["rows"]}
    for row in result["rows"]:
        framework, size = row["framework"], row["size"]
        what = row.get("label") or " ".join(filter(None, (row["kind"], row["name"])))
        cells = [what, FRAMEWORKS[framework], size]
        if "failed" in row:
            found.append((*cells, *[""] * (len(headers) - len(cells) - 1), row["failed"]))
            continue
        copy, adamw = (
            of.get(("copy", "torch", "", size)),
            of.get(("step", framework, "adamw", size)),
        )
        count = None if copy is None or "failed" in copy else copy["moved_bytes"] / 8
        ratio = None
        if adamw is not None and _is_step(row, adamw):
            ratio = row["milliseconds"] / adamw["milliseconds"]
        moved = row.get("moved_bytes") or 4 * FLOOR.get(row["name"], 0) * (count or 0)
        share = None
        if copy is not None and _is_step(row, copy) and moved:
            speed = copy["moved_bytes"] / copy["milliseconds"]
            share = moved / row["milliseconds"] / speed
        found.append(
            (
                *cells,
                _cell(row.get("milliseconds"), ".3f"),
                _cell(row.get("host_milliseconds"), ".3f"),
                _cell(_in_graph(row, of), ".3f"),
                _cell(ratio, ".2f"),
                _cell(FLOOR[row["name"]] / FLOOR["adamw"] if _floored(row) else None, ".2f"),
                _cell(moved / count if count and moved and row["kind"] == "step" else None, ".1f"),
                _cell(share, ".0%"),
                _cell(row.get("launches") or _counted(row), "d"),
                _cell(row.get("state_bytes_per_parameter"), ".2f"),
                _said(row),
            )
        )
    for key in result["left"]:
        found.append((key, *[""] * (len(headers) - 2), "not measured"))
    return Rows(headers, found)


def _in_graph(row: dict[str, Any], of: dict[tuple[str, ...], dict[str, Any]]) -> float | None:
    """Milliseconds of a step that is replayed from a CUDA graph, where it was captured."""
    if row["kind"] != "step":
        return None
    return of.get(("waits", *_key(row)[1:]), {}).get("graph_milliseconds")


def _counted(row: dict[str, Any]) -> int | None:
    """What a step starts by what it calls, where no profiler has seen it."""
    return row["own_launches"] + row["torch_calls"] if row.get("own_launches") else None


def _floored(row: dict[str, Any]) -> bool:
    return row["kind"] == "step" and row["name"] in FLOOR


def _is_step(row: dict[str, Any], other: dict[str, Any] | None) -> bool:
    return row["kind"] == "step" and other is not None and "failed" not in other


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in Row._fields)


def _cell(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _said(row: dict[str, Any]) -> str:
    if row["kind"] in ("copy", "step"):
        taken = row.get("backend") or {}
        return ", ".join(f"{name} {count}" for name, count in taken.items())
    elsewhere = (*Row._fields, "took", "graph_milliseconds")
    shown = {k: v for k, v in row.items() if k not in elsewhere and v != ""}
    return ", ".join(f"{name} {_short(value)}" for name, value in shown.items())


def _draw(result: dict[str, Any]) -> Figure:
    of = {_key(row): row for row in result["rows"]}
    drawn = []
    for row in result["rows"]:
        if row["kind"] != "step" or "failed" in row:
            continue
        where = f"({FRAMEWORKS[row['framework']]}, {row['size']})"
        times = {f"{row['label']} {where}": row["milliseconds"]}
        graph = _in_graph(row, of)
        if graph is not None:
            times[f"{row['label']}, in a graph {where}"] = graph
        color = COLORS[row["framework"] == "jax"]
        drawn += [(label, time, f"{time:.3g}", color) for label, time in times.items()]
    figure = Figure(figsize=(9, 1.5 + 0.28 * max(1, len(drawn))), layout="constrained")
    axes = figure.add_subplot()
    finish(axes, f"Time of a step ({result['device']})")
    if drawn:
        axes.set_xscale("log")
        bars(axes, drawn, "milliseconds, median")
    return figure


PROTOCOL = Protocol(
    name="gpu",
    title="On a GPU.",
    reading=(
        "The most valuable rows come first, each is on disk as soon as it is finished, and the "
        "same command goes on where it stopped. A step is the optimizer's alone. In PyTorch its "
        "time is the device's between two events, with the step queued beforehand, and `host ms` "
        "that until the call returns, both the median of the repeats, `graph ms` the median of 20 "
        "replays from a CUDA graph; in JAX it is a fifth of five steps in a row. Launches are a "
        "profiler's, or on a CPU what a step calls. Bytes are those that our kernels were handed, "
        "counted at their launch, and for AdamW the least that a step can move; `of copy` is their "
        "share of the speed at which the same run copies as many float32 numbers. The floor is "
        "what a step must move over what AdamW must. Parity is the largest difference from PyTorch "
        "on the CPU after 50 steps, and the share of parameters above 1e-5."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
