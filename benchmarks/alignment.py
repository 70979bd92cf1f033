"""What the self-driving law senses: the alignment of gradient and momentum against the rate."""

import argparse
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks._frameworks import room
from benchmarks._plots import finish
from benchmarks._protocol import Protocol, Rows
from benchmarks.workloads import ALONE, NAMES, load
from cruxy_control import SelfDriving

DIRECTIONS = ("Adam", "Lion", "Muon", "momentum SGD")
"""How a gradient becomes a step."""

WATCHED = 100
"""The alignment and the loss are means over this many last steps."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workload",
        nargs="+",
        choices=[name for name in NAMES if name not in ALONE],
        default=["shakespeare-small", "digits-conv", "digits-vit"],
        help="default: %(default)s",
    )
    parser.add_argument(
        "--direction",
        nargs="+",
        choices=DIRECTIONS,
        default=list(DIRECTIONS),
        help="default: all",
    )
    parser.add_argument(
        "--width",
        nargs="+",
        type=int,
        help="of the language models, multiples of their heads; default: their own",
    )
    parser.add_argument(
        "--share",
        nargs="+",
        type=float,
        default=[0.25, 1.0, 4.0],
        help="sizes of the batch, relative to the workload's (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    parser.set_defaults(framework="jax")


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    if options.steps <= WATCHED:
        raise ValueError(f"--steps must be above {WATCHED}, got {options.steps}.")
    if min(options.share) <= 0.0:
        raise ValueError(f"--share must be above 0, got {min(options.share)}.")
    engine = room("jax", "alignment", "alignment")
    workloads = [
        (width, load(name) if width is None else engine.widened(name, width))
        for name in options.workload
        for width in options.width or [None]
    ]
    curves = []
    for width, workload in workloads:
        for direction in options.direction:
            for share in options.share:
                console.print(f"{_shown(workload.name, width)}, {direction}, batch times {share:g}")
                curve = engine.curve(workload, direction, share, options.steps, WATCHED)
                curves.append(curve | {"width": width})
    return {
        "part": "widths" if options.width else "constant-rates",
        "steps": options.steps,
        "watched": WATCHED,
        "seeds": [0],
        "curves": curves,
    }


def _shown(name: str, width: int | None) -> str:
    return name if width is None else f"{name}, width {width}"


def _best(curve: dict[str, Any]) -> int:
    return int(np.argmin(curve["losses"]))


def _rows(result: dict[str, Any]) -> Rows:
    rows = []
    for curve in result["curves"]:
        best, aligned = _best(curve), curve["alignments"]
        around = [
            _cell(aligned[i]) if 0 <= i < len(aligned) else ""
            for i in (best - 2, best - 1, best, best + 1, best + 2)
        ]
        rate, name = f"{curve['rates'][best]:g}", _shown(curve["workload"], curve["width"])
        rows.append((name, curve["direction"], str(curve["batch"]), rate, *around))
    headers = ("workload", "direction", "batch", "best rate")
    return Rows((*headers, "at a tenth", "at a third", "at the best", "times 3", "times 10"), rows)


def _cell(alignment: float | None) -> str:
    # JSON has no NaN.
    return "diverged" if alignment is None or np.isnan(alignment) else f"{alignment:+.2f}"


def _draw(result: dict[str, Any]) -> Figure:
    names = list(dict.fromkeys(curve["workload"] for curve in result["curves"]))
    directions = list(dict.fromkeys(curve["direction"] for curve in result["curves"]))
    size = (4.0 * len(directions), 2.8 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(names), len(directions), squeeze=False, sharey=True)
    for curve in result["curves"]:
        row, column = names.index(curve["workload"]), directions.index(curve["direction"])
        panel, best = axes[row][column], _best(curve)
        aligned = [np.nan if a is None else a for a in curve["alignments"]]
        width = curve["width"]
        name = f"{'' if width is None else f'width {width}, '}batch {curve['batch']}"
        (line,) = panel.plot(curve["rates"], aligned, label=name, linewidth=1.2)
        panel.plot(curve["rates"][best], aligned[best], "o", color=line.get_color())
    for row, name in enumerate(names):
        for column, direction in enumerate(directions):
            panel = axes[row][column]
            finish(panel, f"{name}, {direction}")
            panel.axhline(SelfDriving().set_point, color="0.4", linestyle=":", linewidth=1)
            panel.set_xscale("log")
            panel.legend(frameon=False, fontsize=8)
            if row == len(names) - 1:
                panel.set_xlabel("rate")
            if column == 0:
                panel.set_ylabel("alignment")
    return figure


PROTOCOL = Protocol(
    name="alignment",
    title="What the self-driving law senses.",
    reading=(
        "Every row trains at seven constant rates, without clipping, decay or averaging, and takes "
        "the mean of the last 100 steps: of the training loss, which tells the best rate, and of "
        "the alignment, the cosine between each gradient and the momentum before it, at that rate "
        "and around it. One seed. A dot marks the best rate, the dotted line the set point."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
"""See `docs/self_driving.md`."""
