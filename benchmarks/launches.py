"""What a step launches and moves on a GPU, counted from what it calls; no GPU is needed."""

import argparse
import importlib.util
import os
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from benchmarks._environment import device
from benchmarks._frameworks import room
from benchmarks._gpu_rows import FLOOR
from benchmarks._plots import COLORS, bars, finish
from benchmarks._protocol import Protocol, Rows
from benchmarks._shapes import gpt_shapes

COUNTED = (
    "adamw", "adamw-foreach", "meta3", "meta_lion", "self_driving", "self_driving-no-average",
    "self_driving-lion", "stability_v1", "stability_v2", "meta_lion-bfloat16", "meta3-8bit",
    "meta3-4bit", "axiom", "cosmic-256KB", "muon",
)  # fmt: skip
SHAPES = {f"{n} blocks": gpt_shapes(n, 32, 65, 16) for n in (1, 2)}
"""What is stepped: of two depths, which shows whether launches grow with the number of tensors."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(framework="torch")
    parser.add_argument("--optimizers", nargs="+", choices=COUNTED, default=list(COUNTED))


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            "launches needs the package triton, which is not installed; run pip install -e "
            "'.[triton]'."
        )
    os.environ["CRUXY_TORCH_BACKEND"] = "triton"
    if device("torch").startswith("cpu"):  # before Triton is imported, which asks for it once
        os.environ["TRITON_INTERPRET"] = "1"
    started = room("torch", "gpu", "launches").started
    rows = [
        {"name": name, **{depth: started(name, shapes) for depth, shapes in SHAPES.items()}}
        for name in track(options.optimizers, "counting", console=console)
    ]
    return {"part": "step", "optimizers": {row["name"]: row for row in rows}}


def _rows(result: dict[str, Any]) -> Rows:
    kinds = ("our kernels", "torch calls")
    headers = (
        "optimizer",
        *(f"{kind}, {_tensors(result, depth)} tensors" for depth in SHAPES for kind in kinds),
        "of them scalars", "words/param moved", "floor",
    )  # fmt: skip
    found = []
    for name, row in result["optimizers"].items():
        last = row[[*SHAPES][-1]]
        counts = [
            str(sum(row[depth][what].values())) for depth in SHAPES for what in ("kernels", "torch")
        ]
        moved = last["moved_words"] / last["parameters"]
        found.append(
            (
                last["label"], *counts,
                str(last["kernels"].get("decide", "")),
                f"{moved:.2f}" if moved else "",
                str(FLOOR.get(name, "")),
            )
        )  # fmt: skip
    return Rows(headers, found)


def _tensors(result: dict[str, Any], depth: str) -> int:
    return next(iter(result["optimizers"].values()))[depth]["tensors"]


def _draw(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 1.5 + 0.28 * len(result["optimizers"])), layout="constrained")
    axes = figure.add_subplot()
    finish(axes, "What a step launches")
    drawn = []
    for row in result["optimizers"].values():
        last = row[[*SHAPES][-1]]
        count = sum(last["kernels"].values()) + sum(last["torch"].values())
        drawn.append((last["label"], count, str(count), COLORS[bool(last["kernels"])]))
    bars(axes, drawn, "our kernels and calls of PyTorch")
    return figure


PROTOCOL = Protocol(
    name="launches",
    title="What a step launches and moves on a GPU.",
    reading=(
        "Counted from the calls of a second step, on a GPU or by Triton's interpreter: our kernels "
        "at their launch, and every operation of PyTorch that is neither a view nor an allocation, "
        "each of which starts at least one kernel or copy. Words of 4 bytes a parameter are those "
        "that our kernels read and write; what operations of PyTorch move is not among them. The "
        "floor is the least that a step can move where gradients are measured before they are used."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
