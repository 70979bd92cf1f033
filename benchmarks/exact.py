"""What exactness costs: a whole training step of the reference GPT, exact against plain."""

import argparse
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks._environment import device
from benchmarks._frameworks import FRAMEWORKS, installed, room
from benchmarks._measured_optimizers import whole
from benchmarks._plots import COLORS, bars, finish
from benchmarks._protocol import Protocol, Rows
from benchmarks._timing import cells, interleave, summary

SIZES: dict[str, dict[str, int]] = {
    "0.1m": {},
    "3m": {"width": 256, "heads": 8, "blocks": 4, "length": 128, "batch": 4},
    "10m": {"width": 384, "heads": 6, "blocks": 6, "length": 256, "batch": 4},
    "120m": {
        "vocabulary": 32768, "width": 768, "heads": 12, "blocks": 10, "length": 512, "batch": 8,
    },
}  # fmt: skip
"""Fields of `cruxy_exact.reference.Reference`, by about how many parameters they make."""
ENGINES = ("f64", "int8", "digits")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--framework", nargs="+", choices=FRAMEWORKS, default=installed(), metavar="NAME",
        help="of jax and torch (default: those that are installed)",
    )  # fmt: skip
    parser.add_argument(
        "--size", nargs="+", choices=SIZES, default=["0.1m"],
        help="parameters; 10m and more want a GPU (default: 0.1m)",
    )  # fmt: skip
    parser.add_argument(
        "--engine", nargs="+", choices=ENGINES, default=["f64"],
        help="how exact products are found (default: f64)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=lambda text: whole(text, "--repeats", least=2), default=20,
        help="rounds that count (default: %(default)s)",
    )  # fmt: skip


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    timings = []
    for framework in options.framework:
        module = room(framework, "exact", "exact")
        for size in options.size:
            steps, count = module.steps(SIZES[size], options.engine)
            rows = summary(interleave(steps, options.repeats, console), "plain")
            common = {"framework": framework, "device": device(framework)}
            timings.append({**common, "size": size, "parameters": count, "steps": rows})
    return {"part": "-".join(options.size), "repeats": options.repeats, "timings": timings}


def _rows(result: dict[str, Any]) -> Rows:
    rows = []
    for timing in result["timings"]:
        for name, row in timing["steps"].items():
            count = f"{timing['parameters'] / 1e6:.2f}M"
            rows.append((name, FRAMEWORKS[timing["framework"]], count, *cells(row)))
    return Rows(("step", "framework", "parameters", "ms", "ratio", "quartiles"), rows)


def _draw(result: dict[str, Any]) -> Figure:
    drawn = [
        (f"{FRAMEWORKS[timing['framework']]}, {timing['size']}, {name}", row["ratio"],
         f"{row['ratio']:.2f}", COLORS[0])
        for timing in result["timings"]
        for name, row in timing["steps"].items()
        if name != "plain"
    ]  # fmt: skip
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(drawn)), layout="constrained")
    axes = figure.add_subplot()
    finish(axes, "Exact steps")
    bars(axes, drawn, "time, ratio to a plain step of the same model")
    return figure


PROTOCOL = Protocol(
    name="exact",
    title="Exact training.",
    reading=(
        "A whole training step of the reference GPT (forward, backward, clip, AdamW), exact and as "
        "people write it in the same framework, on the same random tokens. Both take a step in "
        "each round, in a new order; the ratio is taken round by round. PyTorch's exact step runs "
        "its C kernels on a CPU and no compiler; JAX's steps are compiled."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
