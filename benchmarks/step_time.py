"""How long a step takes: the optimizer's update alone, and all of training, in both frameworks."""

import argparse
import math
import os
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks._environment import device
from benchmarks._frameworks import FRAMEWORKS, room
from benchmarks._measured_optimizers import MODELS, add_arguments, chosen, part, whole
from benchmarks._plots import COLORS, finish
from benchmarks._protocol import Protocol, Rows
from benchmarks._shapes import SIZES
from benchmarks._timing import cells
from benchmarks.workloads import load

TRAINED = ("adamw", "meta3", "meta_lion", "self_driving", "self_driving-muon", "muon")
"""Whose whole training step is timed, where they are chosen."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.add_argument(
        "--size", choices=SIZES, default="10m", help="parameters of the steps without training"
    )
    parser.add_argument(
        "--repeats",
        type=lambda text: whole(text, "--repeats", least=2),
        default=100,
        help="rounds that count (default: %(default)s, which gives a steady ratio)",
    )
    parser.add_argument(
        "--training",
        nargs="*",
        choices=MODELS,
        default=["shakespeare-small"],
        help=f"models whose whole training step is timed with {', '.join(TRAINED)}; none where "
        "nothing follows; 10m wants a GPU (default: shakespeare-small)",
    )


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    # JAX would take three quarters of a GPU's memory before PyTorch gets any.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    names = chosen(options, console)
    data = None if options.data is None else str(options.data)
    first = options.framework[0]  # the settings are the same in all
    settings = {name: load(name, data, first).settings for name in options.training}
    timings = []
    for framework, wanted in names.items():
        module = room(framework, "step_time", "step-time")
        common = {"framework": framework, "device": device(framework)}
        rows = module.optimizer_steps(SIZES[options.size], options.repeats, wanted, console)
        timings.append({**common, "step": "update", "optimizers": rows})
        trained = [name for name in TRAINED if name in wanted]
        for name in options.training:
            rows = module.training_steps(name, data, options.repeats, trained, console)
            timings.append({**common, "step": name, "optimizers": rows})
    return {
        "part": part(options.size, options),
        "parameters": sum(math.prod(shape) for shape in SIZES[options.size].values()),
        "repeats": options.repeats,
        "workloads": settings,
        "timings": timings,
    }


def _rows(result: dict[str, Any]) -> Rows:
    headers = ("optimizer", "framework", "step", "ms", "ratio", "quartiles", "B/param")
    # What is counted in a compiled program; figures of PyTorch alone have no such columns.
    compiled = any(
        "compile_ratio" in row for t in result["timings"] for row in t["optimizers"].values()
    )
    counted = ("compile", "reads", "copies", "temp.", "calls") if compiled else ()
    rows = []
    for timing in result["timings"]:
        for row in timing["optimizers"].values():
            state = row.get("state_bytes_per_parameter")
            rows.append(
                (
                    row["label"],
                    FRAMEWORKS[timing["framework"]],
                    timing["step"].replace("shakespeare-", "GPT "),
                    *cells(row),
                    "" if state is None else f"{state:.3f}",
                    *(_counted(row) if "compile_ratio" in row else [""] * len(counted)),
                )
            )
    return Rows((*headers, *counted), rows)


def _counted(row: dict[str, Any]) -> tuple[str, ...]:
    reads = row["gradient_reads"]
    return (
        f"{row['compile_ratio']:.2f}",
        "" if reads is None or math.isnan(reads) else f"{reads:.1f}",
        f"{row['copied_bytes'] / 1e6:.1f}",
        f"{row['temporary_bytes'] / 1e6:.1f}",
        str(row["host_calls"]),
    )


def _draw(result: dict[str, Any]) -> Figure:
    timings = result["timings"]
    figure = Figure(figsize=(9, 0.9 + 0.8 * len(timings) + 0.25 * _entries(timings)))
    figure.set_layout_engine("constrained")
    heights = [len(timing["optimizers"]) + 2 for timing in timings]
    panels = figure.subplots(len(timings), 1, squeeze=False, height_ratios=heights, sharex=True)
    for axes, timing in zip(panels[:, 0], timings, strict=True):
        finish(axes, f"{FRAMEWORKS[timing['framework']]}: {timing['step']}")
        for place, row in enumerate(timing["optimizers"].values()):
            low, high = row["ratio_quartiles"]
            middle = row["ratio"]
            bars = [[middle - low], [high - middle]]
            axes.errorbar(middle, place, xerr=bars, fmt="o", color=COLORS[0], capsize=3)
        labels = [row["label"] for row in timing["optimizers"].values()]
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.axvline(1.0, color="0.6", linewidth=1)
        axes.set_xscale("log")
    panels[-1, 0].set_xlabel("time, ratio to AdamW in the same framework; bars: quartiles")
    return figure


def _entries(timings: list[dict[str, Any]]) -> int:
    return sum(len(timing["optimizers"]) for timing in timings)


PROTOCOL = Protocol(
    name="step-time",
    title="Step time.",
    reading=(
        "Every optimizer takes a step in each round, in a new order each round; the ratio to AdamW "
        "(`optax.adamw`, `torch.optim.AdamW(fused=True)`) is taken round by round, so that a "
        "machine whose speed drifts still gives the right one, and its median and quartiles are "
        "shown. The step `update` is the optimizer's alone; that of a GPT is forward, backward and "
        "update. JAX steps are compiled with parameters and state donated; beside an update stands "
        "what was counted in its program: compile time as a ratio to AdamW's, how often each "
        "gradient is read, megabytes of copies and of temporaries, calls of the host. PyTorch "
        "steps are not compiled."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
