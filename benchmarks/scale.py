"""What an optimizer's step sends between devices, and what each holds: counted, not run."""

import argparse
import json
import math
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from benchmarks._counted import Task
from benchmarks._environment import basis
from benchmarks._finished import files, finished, keep, source_of
from benchmarks._frameworks import FRAMEWORKS, installed, room
from benchmarks._models import MODELS, count, split, tensors
from benchmarks._plots import COLORS, bars, finish
from benchmarks._protocol import Protocol, Rows
from benchmarks._wire import Message, sent_bytes, total_sent

USUAL = (
    "adamw", "adafactor", "muon", "meta3", "self_driving", "self_driving_muon", "axiom", "cosmic",
)  # fmt: skip
"""What is counted where nothing is asked for, in the frameworks that have it."""

SOURCES = (
    "cruxy_*/**/*.py",
    "benchmarks/_*/scale.py",
    "benchmarks/_jax/hlo.py",
    "benchmarks/_models.py",
)
"""What a row depends on."""


def mesh_of(text: str) -> dict[str, int]:
    """The axes of a mesh, from text such as `data=64,model=8`.

    Raises:
        argparse.ArgumentTypeError: if it is none.
    """
    try:
        pairs = [part.split("=") for part in text.split(",")]
        mesh = {name: int(size) for name, size in pairs}
    except ValueError:
        mesh = {}
    if not mesh or min(mesh.values()) < 1 or not {"data", "model"}.issuperset(mesh):
        raise argparse.ArgumentTypeError(
            f'--mesh must be axes "data" and "model" with sizes of at least 1, got {text!r}; give '
            "one like data=64,model=8"
        )
    return mesh


def _above_zero(text: str) -> float:
    value = float(text)
    if not (value > 0.0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _arguments(parser: argparse.ArgumentParser) -> None:
    there = installed() or [*FRAMEWORKS]
    parser.add_argument("--framework", choices=FRAMEWORKS, default=there[0], help="(%(default)s)")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["llama-7b"])
    parser.add_argument(
        "--mesh",
        nargs="+",
        type=mesh_of,
        default=[{"data": 4, "model": 2}, {"data": 8, "model": 8}, {"data": 64, "model": 8}],
        help="sizes of its axes, such as data=64,model=8 (default: 8, 64 and 512 devices)",
    )
    parser.add_argument(
        "--optimizer", nargs="+", metavar="NAME", help=f"default: {' '.join(USUAL)}"
    )
    parser.add_argument(
        "--stacked",
        action=argparse.BooleanOptionalAction,
        help="all layers are one tensor each, as a scan has them (default: in JAX)",
    )
    parser.add_argument(
        "--bandwidth",
        type=_above_zero,
        default=50.0,
        help="gigabytes a second that a device sends (default: %(default)s, 400 Gbit/s)",
    )
    parser.add_argument(
        "--patience",
        type=_above_zero,
        default=900.0,
        help="seconds after which a step is given up (default: %(default)s)",
    )


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    module = room(options.framework, "scale", "scale")
    names = options.optimizer or [name for name in USUAL if name in module.OPTIMIZERS]
    for name in names:
        if name not in module.OPTIMIZERS:
            known = ", ".join(module.OPTIMIZERS)
            raise ValueError(f"--optimizer must be one of {known}, got {name!r}.")
    for model in options.model:
        for mesh in options.mesh:
            for own in tensors(MODELS[model]).values():
                split(own, mesh)
    stacked = options.framework == "jax" if options.stacked is None else options.stacked
    store = options.output / "scale-rows.jsonl"
    source = source_of(files(SOURCES, "scale"), basis(options.framework))
    done = {_key(row): row for row in finished(store, source)}
    tasks = [Task(name, model, stacked) for model in options.model for name in names]
    wanted = [(task, mesh) for task in tasks for mesh in options.mesh]
    with Progress(console=console) as bar:
        shown = bar.add_task("counting", total=len(wanted))
        for mesh in options.mesh:
            left = [task for task in tasks if _key(_named(task, mesh)) not in done]
            bar.advance(shown, len(tasks) - len(left))
            answers = module.measured(mesh, left, patience=options.patience)
            for task, found in zip(left, answers, strict=True):
                row = _named(task, mesh) | {"label": module.OPTIMIZERS[task.name][0]} | found
                keep(store, source, row)
                done[_key(row)] = row
                bar.advance(shown)
    rows = [done[_key(_named(task, mesh))] for task, mesh in wanted]
    for row in rows:
        if reason := row.get("failed"):
            raise ValueError(f"{row['label']} on {row['model']} cannot be counted: {reason}")
        messages = [Message(**message) for message in row["messages"]]
        for message, entry in zip(messages, row["messages"], strict=True):
            entry["sent_bytes"] = sent_bytes(message)
        row["sent_bytes"] = total_sent(messages)
        row["wire_seconds"] = row["sent_bytes"] / (options.bandwidth * 1e9)
    layers = "stacked" if stacked else "layers"
    return {
        "part": "-".join([options.framework, *options.model, layers]),
        "framework": options.framework,
        "parameters": {model: count(tensors(MODELS[model])) for model in options.model},
        "bandwidth": options.bandwidth,
        "optimizers": rows,
    }


def _named(task: Task, mesh: dict[str, int]) -> dict[str, Any]:
    """The part of a row that says what it is of."""
    return {**task._asdict(), "mesh": mesh}


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row[part] for part in (*Task._fields, "mesh")])


def _kinds(messages: list[dict[str, Any]]) -> str:
    """Each operation with its number and axes: `2 all-reduce (data), 1 all-reduce (model)`."""
    counts: dict[tuple[str, str], int] = {}
    for message in messages:
        key = (message["operation"], "+".join(message["axes"]) or "?")
        counts[key] = counts.get(key, 0) + message["times"]
    return ", ".join(f"{n} {operation} ({axes})" for (operation, axes), n in counts.items())


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**30:.3f}"


def _cpu_seconds(row: dict[str, Any]) -> float | None:
    """In all, `None` where nothing was compiled."""
    stages = row.get("cpu_seconds")
    return None if stages is None else sum(stages.values())


def _compiling(row: dict[str, Any], plain: float | None) -> tuple[str, str]:
    """The CPU seconds of each stage, and how many times those of AdamW they are."""
    seconds = _cpu_seconds(row)
    if seconds is None:
        return "", ""
    stages = ", ".join(f"{value:.1f}" for value in row["cpu_seconds"].values())
    return stages, "" if plain is None else f"{seconds / plain:.1f}"


def _rows(result: dict[str, Any]) -> Rows:
    headers = (
        "optimizer",
        "model",
        "mesh",
        "GiB parameters",
        "gradients",
        "state",
        "peak",
        "number of messages",
        "messages",
        "MB sent",
        f"ms at {result['bandwidth']:g} GB/s",
        "CPU s to trace, lower, compile",
        "times AdamW's",
    )
    plain = {
        (row["model"], *row["mesh"].items()): _cpu_seconds(row)
        for row in result["optimizers"]
        if row["name"] == "adamw"
    }
    rows = []
    for row in result["optimizers"]:
        mesh = ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items())
        if row.get("axis_types") == "auto":
            mesh += ", automatic"
        bytes_held = ("parameter_bytes", "gradient_bytes", "state_bytes", "peak_bytes")
        rows.append(
            (
                row["label"],
                row["model"],
                mesh,
                *(_gib(row[key]) for key in bytes_held),
                str(sum(message["times"] for message in row["messages"])),
                _kinds(row["messages"]) or "none",
                f"{row['sent_bytes'] / 1e6:,.4g}",
                f"{1e3 * row['wire_seconds']:,.3g}",
                *_compiling(row, plain.get((row["model"], *row["mesh"].items()))),
            )
        )
    return Rows(headers, rows)


def _draw(result: dict[str, Any]) -> Figure:
    rows = result["optimizers"]
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    finish(axes, f"Sent by a device in a step, {FRAMEWORKS[result['framework']]}")
    models = list(result["parameters"])
    drawn = [
        (
            f"{row['label']}, {row['model']}, {math.prod(row['mesh'].values())} devices",
            row["sent_bytes"] / 1e6,
            f"{sum(message['times'] for message in row['messages'])} messages",
            COLORS[models.index(row["model"]) % len(COLORS)],
        )
        for row in rows
    ]
    bars(axes, drawn, "megabytes")
    return figure


PROTOCOL = Protocol(
    name="scale",
    title="At scale.",
    reading=(
        "The optimizer's step alone, its parameters abstract, float32, matrices split along both "
        "axes of the mesh and vectors on every device; gradients lie like parameters, so that what "
        "makes them is not counted. In JAX it is compiled for so many devices, on explicit axes "
        "unless the row says that they are automatic, in PyTorch one rank of a process group that "
        "sends nothing steps on the meta device; it is never run. Bytes are those of one device. "
        "What it sends is counted as in rings. Of stacked layers optax's Muon makes no matrix "
        "orthogonal: there it is Adam but for the embedding and the head. The peak is the "
        "compiler's, on a CPU, with parameters, state and gradients donated; in PyTorch that of "
        "the tensors that live at once."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
