"""Whether a run that was stopped, saved and resumed is, to the bit, the run never stopped."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from benchmarks._frameworks import FRAMEWORKS, room
from benchmarks._measured_optimizers import MODELS, add_arguments, chosen, part, registry, whole
from benchmarks._plots import COLORS, bars, finish
from benchmarks._protocol import Protocol, Rows
from benchmarks.workloads import load


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, ours_alone=True)
    parser.add_argument(
        "--workload",
        choices=MODELS,
        default="shakespeare-small",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--steps",
        type=lambda text: whole(text, "--steps", least=2),
        default=40,
        help="of both runs (default: %(default)s)",
    )
    parser.add_argument(
        "--stop",
        type=lambda text: whole(text, "--stop", least=1),
        default=17,
        help="steps before the stop (default: %(default)s)",
    )


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    if options.stop >= options.steps:
        raise ValueError(
            f"--stop must be below --steps, got {options.stop} and {options.steps}; "
            "leave steps to be taken after it."
        )
    names = chosen(options, console)
    data = None if options.data is None else str(options.data)
    settings = load(options.workload, data, options.framework[0]).settings
    wanted = [(framework, name) for framework, known in names.items() for name in known]
    rows = []
    for framework, name in track(wanted, "training, stopping, resuming", console=console):
        entry = registry(framework)[name]
        with tempfile.TemporaryDirectory() as folder:
            outcome = room(framework, "resume", "resume").resume(
                entry.make,
                options.workload,
                data,
                steps=options.steps,
                stop=options.stop,
                folder=Path(folder),
            )
        rows.append(
            {"framework": framework, "name": name, "label": entry.label, **outcome._asdict()}
        )
    return {
        "part": part(options.workload, options),
        "workload": {"name": options.workload, **settings},
        "steps": options.steps,
        "stop": options.stop,
        "optimizers": rows,
    }


def _rows(result: dict[str, Any]) -> Rows:
    return Rows(
        ("optimizer", "framework", "bytes on disk", "bit-identical", "first that differs"),
        [
            (
                row["label"],
                FRAMEWORKS[row["framework"]],
                f"{row['bytes_on_disk']:,}",
                "NO" if row["first_difference"] else "yes",
                row["first_difference"] or "",
            )
            for row in result["optimizers"]
        ],
    )


def _draw(result: dict[str, Any]) -> Figure:
    rows = result["optimizers"]
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    finish(axes, f"Checkpoints of {result['workload']['name']} after {result['stop']} steps")
    drawn = [
        (
            f"{row['label']} ({FRAMEWORKS[row['framework']]})",
            row["bytes_on_disk"] / 1e6,
            "differs" if row["first_difference"] else "bit-identical",
            # The second colour stands out where a resumed run was not the same.
            COLORS[row["first_difference"] is not None],
        )
        for row in rows
    ]
    bars(axes, drawn, "megabytes on disk, parameters and optimizer state")
    return figure


PROTOCOL = Protocol(
    name="resume",
    title="Stop and resume.",
    reading=(
        "One run is never stopped. Another is stopped, its parameters and optimizer state are "
        "saved (Orbax in JAX, `torch.save` in PyTorch), everything is built anew, loaded, and "
        "trained to the end on the batches that remain. Both have to end with the same bits in "
        "every parameter and every number of the state."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
