"""How much memory an optimizer takes: its state, and a training step at its peak."""

import argparse
import math
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from benchmarks._frameworks import FRAMEWORKS, room
from benchmarks._measured_optimizers import MODELS, add_arguments, chosen, part, registry
from benchmarks._plots import COLORS, bars, finish
from benchmarks._protocol import Protocol, Rows
from benchmarks._shapes import SIZES, TINYLLAMA
from benchmarks.workloads import load

SETS = {"10m": SIZES["10m"], "tinyllama": TINYLLAMA}
"""The parameters whose state is counted."""

PEAKS = ("shakespeare-paper", "shakespeare-10m")


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.add_argument(
        "--training",
        nargs="*",
        choices=MODELS,
        default=list(PEAKS),
        help="models whose training step is compiled for its peak; none where nothing follows "
        f"(default: {' '.join(PEAKS)})",
    )


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    names = chosen(options, console)
    data = None if options.data is None else str(options.data)
    first = options.framework[0]  # the settings are the same in all
    settings = {name: load(name, data, first).settings for name in options.training}
    wanted = [(framework, name) for framework, known in names.items() for name in known]
    rows = []
    for framework, name in track(wanted, "counting", console=console):
        module = room(framework, "memory", "memory")
        rows.append(
            {
                "framework": framework,
                "name": name,
                "label": registry(framework)[name].label,
                "state_bytes": {key: module.state_bytes(name, s) for key, s in SETS.items()},
                "peak_bytes": {
                    trained: module.peak_bytes(name, trained, data) for trained in settings
                },
            }
        )
    return {
        "part": part("state", options),
        "parameters": {key: sum(map(math.prod, shapes.values())) for key, shapes in SETS.items()},
        "workloads": settings,
        "optimizers": rows,
    }


def _rows(result: dict[str, Any]) -> Rows:
    counts, works = result["parameters"], result["workloads"]
    headers = (
        "optimizer",
        "framework",
        *(f"state B/param, {key} ({count / 1e6:,.1f}M)" for key, count in counts.items()),
        *(f"peak MiB, {name}" for name in works),
    )
    rows = []
    for row in result["optimizers"]:
        states = [f"{row['state_bytes'][key] / count:.4f}" for key, count in counts.items()]
        peaks = [row["peak_bytes"][name] for name in works]
        shown = ["" if peak is None else f"{peak / 2**20:,.1f}" for peak in peaks]
        rows.append((row["label"], FRAMEWORKS[row["framework"]], *states, *shown))
    return Rows(headers, rows)


def _draw(result: dict[str, Any]) -> Figure:
    rows = result["optimizers"]
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    key, count = [*result["parameters"].items()][-1]
    finish(axes, f"Optimizer state, {key}")
    color = dict(zip(FRAMEWORKS, COLORS, strict=False))
    drawn = [
        (
            f"{row['label']} ({FRAMEWORKS[row['framework']]})",
            row["state_bytes"][key] / count,
            f"{row['state_bytes'][key] / count:.3g}",
            color[row["framework"]],
        )
        for row in rows
    ]
    bars(axes, drawn, "bytes a parameter, parameters float32")
    return figure


PROTOCOL = Protocol(
    name="memory",
    title="Memory.",
    reading=(
        "State is what an optimizer keeps from step to step, counted leaf by leaf in the shapes of "
        "a GPT and of TinyLlama-1.1B, parameters float32; nothing is allocated for it. The peak is "
        "that of a training step with its model, batch, gradients and activations: in JAX by the "
        "compiler's own analysis of the step with parameters and state donated, in PyTorch what "
        "the third step allocated on a GPU at most, and empty without one."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
