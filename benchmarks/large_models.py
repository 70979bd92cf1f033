"""What each way of training keeps for models of one, seven and thirty-four billion parameters."""

import argparse
import math
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks._frameworks import room
from benchmarks._plots import COLORS, bars, finish
from benchmarks._protocol import Protocol, Rows


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(framework="torch")


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    counted = room("torch", "large_models", "large-models")
    models = {}
    for name, config in counted.MODELS.items():
        console.print(f"counting {name}, without its weights")
        shapes, rank = counted.shapes_of(name), config.hidden_size // 4
        models[name] = {
            "parameters": sum(math.prod(shape) * count for shape, count in shapes.items()),
            "rank": rank,
            "ways": {way.label: counted.held(way, shapes, rank) for way in counted.WAYS},
        }
    return {"part": "meta-device", "models": models}


def _beside(found: dict[str, int]) -> int:
    return found["gradients"] + found["state"]


def _rows(result: dict[str, Any]) -> Rows:
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
        "is no run. Activations come on top."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
