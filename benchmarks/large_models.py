"""What each way of training keeps for models of one, seven and thirty-four billion parameters.

With `--measure` a model that fits is made of random weights, and trained for a few steps in a
process for each way, whose peak of resident memory stands beside what is counted.
"""

import argparse
import math
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks._frameworks import room
from benchmarks._plots import COLORS, bars, finish
from benchmarks._protocol import Protocol, Rows

MEASURED = ("llama-1.1b", "llama-0.3b", "llama-tiny")
"""Shapes that can be trained here: TinyLlama's, with 4 of its 22 layers, and one for tests."""

ROOM = 1.2
"""A way is measured where so many times its counted bytes are free."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(framework="torch")
    parser.add_argument(
        "--measure",
        choices=MEASURED,
        help="train a model of this shape for a few steps in place of counting",
    )
    parser.add_argument(
        "--tokens", type=int, default=256, help="of the sequence that is measured (default: 256)"
    )
    parser.add_argument(
        "--steps", type=int, default=2, help="that are taken to measure (default: 2)"
    )


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    for name in ("tokens", "steps"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}.")
    return (_counted if options.measure is None else _trained)(options, console)


def _trained(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    counted = room("torch", "large_models", "large-models")
    trained = room("torch", "large_runs", "large-models --measure")
    config = trained.SHAPES[options.measure]
    shapes, runs = counted.shapes_of(config), []
    for label, bits in trained.RUNS:
        held = counted.held(trained.way_of(label), shapes, config.hidden_size // 4)
        run: dict[str, Any] = {"way": label, "bits": bits, "counted": held}
        free = trained.available()
        if free is not None and ROOM * sum(held.values()) > free:
            console.print(f"{label}: left out, {ROOM} times what is counted is more than there is")
        else:
            console.print(f"training {options.measure} with {label}, activations in {bits or 16}")
            run["measured"] = trained.measured(
                options.measure, label, bits, options.tokens, options.steps
            )
        runs.append(run)
    return {
        "part": f"measured-{options.measure}",
        "model": options.measure,
        "parameters": sum(math.prod(shape) * count for shape, count in shapes.items()),
        "tokens": options.tokens,
        "steps": options.steps,
        "runs": runs,
    }


def _counted(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    counted = room("torch", "large_models", "large-models")
    models = {}
    for name, config in counted.MODELS.items():
        console.print(f"counting {name}, without its weights")
        shapes, rank = counted.shapes_of(config), config.hidden_size // 4
        models[name] = {
            "parameters": sum(math.prod(shape) * count for shape, count in shapes.items()),
            "rank": rank,
            "ways": {way.label: counted.held(way, shapes, rank) for way in counted.WAYS},
        }
    return {"part": "meta-device", "models": models}


def _beside(found: dict[str, int]) -> int:
    return found["gradients"] + found["state"]


def _named(run: dict[str, Any]) -> str:
    return run["way"] + (f", activations in {run['bits']} bits" if run["bits"] else "")


def _rows_measured(result: dict[str, Any]) -> Rows:
    kinds = ("weights", "gradients", "state")
    headers = (
        "way",
        *(f"{kind}, GB" for kind in kinds),
        "activations, GB",
        "their sum, GB",
        "peak above the libraries, GB",
        "counted without activations, GB",
    )
    rows = []
    for run in result["runs"]:
        counted, found = f"{sum(run['counted'].values()) / 1e9:.3f}", run.get("measured")
        if found is None:
            rows.append((_named(run), *["does not fit"] * 6, counted))
            continue
        parts = [found[kind] for kind in (*kinds, "activations")]
        sizes = [*parts, sum(parts), found["peak"] - found["libraries"]]
        rows.append((_named(run), *(f"{size / 1e9:.3f}" for size in sizes), counted))
    return Rows(headers, rows)


def _draw_measured(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 1.6 + 0.4 * len(result["runs"])), layout="constrained")
    axes = figure.add_subplot()
    finish(axes, f"Peak of resident memory, {result['model']}, {result['tokens']} tokens")
    peaks = [
        (_named(run), (run["measured"]["peak"] - run["measured"]["libraries"]) / 1e9)
        for run in result["runs"]
        if "measured" in run
    ]
    bars(axes, [(label, peak, f"{peak:.3g}", COLORS[0]) for label, peak in peaks], "GB")
    return figure


def _rows(result: dict[str, Any]) -> Rows:
    if "runs" in result:
        return _rows_measured(result)
    headers = (
        "model",
        "way",
        "weights, GB",
        "gradients, GB",
        "state, GB",
        "less",
        "less, with weights",
    )
    rows = []
    for name, model in result["models"].items():
        first = next(iter(model["ways"].values()))
        for label, found in model["ways"].items():
            sizes = [f"{found[kind] / 1e9:,.3f}" for kind in ("weights", "gradients", "state")]
            less = [_beside(first) / _beside(found), sum(first.values()) / sum(found.values())]
            rows.append((name, label, *sizes, *(f"{ratio:,.1f} x" for ratio in less)))
    return Rows(headers, rows)


def _draw(result: dict[str, Any]) -> Figure:
    if "runs" in result:
        return _draw_measured(result)
    name, model = list(result["models"].items())[1]
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(model["ways"])), layout="constrained")
    axes = figure.add_subplot()
    finish(axes, f"Gradients and optimizer state, {name}")
    drawn = [
        (label, _beside(found) / 1e9, f"{_beside(found) / 1e9:.3g}", COLORS[0])
        for label, found in model["ways"].items()
    ]
    bars(axes, drawn, "GB")
    return figure


PROTOCOL = Protocol(
    name="large-models",
    title="Models that do not fit.",
    reading=(
        "What a way of training keeps, counted on the meta device in published shapes, where no "
        "weight is made. Weights and gradients are bfloat16, but AdamW's float32. Released "
        "gradients count with the largest tensor, which is what is alive at once. GaLore and "
        "APOLLO project every matrix to a quarter of the model's width. The last two columns "
        "compare with AdamW: gradients and state, and these with the weights, without which there "
        "is no run. Activations come on top. What is measured is one sequence through random "
        "weights in a process for each way: the most bytes of gradients that hooks see alive, the "
        "state that is there, what autograd keeps of a forward pass, and the peak of resident "
        "memory above that of the imported libraries."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
