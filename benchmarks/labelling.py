"""How long it takes to tell what each parameter of a large model is."""

import argparse
import statistics
import time
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks._frameworks import room
from benchmarks._measured_optimizers import whole
from benchmarks._plots import COLORS, bars, finish
from benchmarks._protocol import Protocol, Rows


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(framework="torch")
    parser.add_argument(
        "--repeats",
        type=lambda text: whole(text, "--repeats", least=1),
        default=9,
        help="times that each is labelled (default: %(default)s)",
    )


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    found = {}
    for name, make in room("torch", "labelling", "labelling").MODELS.items():
        console.print(f"making {name}, without its weights")
        model, label = make()
        roles, seconds = label(model), []
        for _ in range(options.repeats):
            begun = time.perf_counter()
            label(model)
            seconds.append(time.perf_counter() - begun)
        parameters = dict(model.named_parameters())
        guesses = [parameters[k] for k, role in roles.items() if role in ("matrix", "vector")]
        found[name] = {
            "tensors": len(roles),
            "parameters": sum(p.numel() for p in parameters.values()),
            "roles": len(set(roles.values())),
            "told_by_shape_alone": len(guesses),
            "milliseconds": 1e3 * statistics.median(seconds),
            "slowest": 1e3 * max(seconds),
        }
    return {"part": "meta-device", "models": found}


def _rows(result: dict[str, Any]) -> Rows:
    return Rows(
        ("model", "tensors", "parameters", "roles", "told by shape alone", "ms, median", "slowest"),
        [
            (
                name,
                str(row["tensors"]),
                f"{row['parameters']:,}",
                str(row["roles"]),
                str(row["told_by_shape_alone"]),
                f"{row['milliseconds']:.1f}",
                f"{row['slowest']:.1f}",
            )
            for name, row in result["models"].items()
        ],
    )


def _draw(result: dict[str, Any]) -> Figure:
    rows = result["models"]
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    finish(axes, "What is each parameter? On the meta device")
    drawn = [
        (name, row["milliseconds"], f"{row['tensors']} tensors", COLORS[0])
        for name, row in rows.items()
    ]
    bars(axes, drawn, "milliseconds")
    return figure


PROTOCOL = Protocol(
    name="labelling",
    title="Time to label a model.",
    reading=(
        "`cruxy_torch.label_roles` on models that are built from their published configurations "
        "on the meta device, where no weight is made."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
