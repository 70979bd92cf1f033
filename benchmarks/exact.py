"""What exactness costs: a training step of the reference GPT, and the loss of a trained one."""

import argparse
import os
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks._environment import device
from benchmarks._frameworks import FRAMEWORKS, installed, room
from benchmarks._measured_optimizers import whole
from benchmarks._plots import COLORS, bars, finish
from benchmarks._protocol import Protocol, Rows
from benchmarks._statistics import mean, paired
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
    parser.add_argument(
        "--cpu-time", action="store_true",
        help="one thread, the processor's time in place of the clock's, and the shortest step in "
        "place of the median: for a machine that others use as well",
    )  # fmt: skip
    parser.add_argument(
        "--losses", choices=("shakespeare-small", "shakespeare-paper"), metavar="WORKLOAD",
        help="in place of timing, train this language model in JAX, exactly and plainly, and "
        "compare the losses on held-out text",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=lambda text: whole(text, "--steps", least=20), default=1000,
        help="of each run of --losses (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2],
        help="of the runs of --losses (default: 0 1 2)",
    )  # fmt: skip
    parser.add_argument("--data", help="a text file for --losses")


ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    if options.losses:
        return _losses(options, console)
    if options.cpu_time:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}".strip()
    timings = []
    for framework in options.framework:
        module = room(framework, "exact", "exact")
        for size in options.size:
            steps, count = module.steps(SIZES[size], options.engine, cpu_time=options.cpu_time)
            seconds = interleave(steps, options.repeats, console)
            rows = summary(seconds, "plain")
            if options.cpu_time:
                rows = {name: _shortest(row, seconds, name) for name, row in rows.items()}
            common = {"framework": framework, "device": device(framework)}
            timings.append({**common, "size": size, "parameters": count, "steps": rows})
    alone = options.framework if len(options.framework) == 1 else []
    names = [*alone, *options.size, *(["cpu-time"] if options.cpu_time else [])]
    return {"part": "-".join(names), "repeats": options.repeats, "timings": timings}


def _shortest(
    row: Mapping[str, Any], seconds: Mapping[str, list[float]], name: str
) -> dict[str, Any]:
    """A row with the shortest step in place of the median one, and the ratio of those."""
    least = {other: min(times) for other, times in seconds.items()}
    own = {"milliseconds": 1e3 * least[name], "ratio": least[name] / least["plain"]}
    return {**row, **own}


def _losses(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    train = room("jax", "exact_losses", "exact --losses").train
    kinds = {"plain": False, "exact": True}
    runs: dict[str, dict[str, Any]] = {name: {} for name in kinds}
    for seed in options.seeds:
        for name, exactly in kinds.items():
            run = train(options.losses, seed, options.steps, options.data, exactly=exactly)
            runs[name][str(seed)] = run
            console.print(f"seed {seed}, {name}: {run['held_out']:.4f}, {run['checksum']}")
    return {"part": f"losses-{options.losses}", "steps": options.steps, "runs": runs}


def _held_out(result: dict[str, Any]) -> dict[str, dict[int, float]]:
    return {
        name: {int(seed): run["held_out"] for seed, run in runs.items()}
        for name, runs in result["runs"].items()
    }


def _rows(result: dict[str, Any]) -> Rows:
    if "runs" in result:
        values = _held_out(result)
        rows = [
            (name, str(mean([*row.values()])), str(paired(row, values["plain"])),
             ", ".join(run["checksum"] for run in result["runs"][name].values()))
            for name, row in values.items()
        ]  # fmt: skip
        headers = ("training", "held-out loss", "minus plain, by seed", "checksums")
        return Rows(headers, rows)
    rows = []
    for timing in result["timings"]:
        for name, row in timing["steps"].items():
            count = f"{timing['parameters'] / 1e6:.2f}M"
            rows.append((name, FRAMEWORKS[timing["framework"]], count, *cells(row)))
    return Rows(("step", "framework", "parameters", "ms", "ratio", "quartiles"), rows)


def _draw(result: dict[str, Any]) -> Figure:
    if "runs" in result:
        return _draw_losses(_held_out(result))
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


def _draw_losses(values: dict[str, dict[int, float]]) -> Figure:
    figure = Figure(figsize=(9, 2.2), layout="constrained")
    axes = figure.add_subplot()
    finish(axes, "Exact and plain training")
    rows = [
        (f"{name}, seed {seed}", loss, f"{loss:.4f}", COLORS[i])
        for i, (name, row) in enumerate(values.items())
        for seed, loss in row.items()
    ]
    bars(axes, rows, "loss on held-out text (nats per character)")
    return figure


PROTOCOL = Protocol(
    name="exact",
    title="Exact training.",
    reading=(
        "A whole training step of the reference GPT (forward, backward, clip, AdamW), exact and as "
        "people write it in the same framework, on the same random tokens. Both take a step in "
        "each round, in a new order; the ratio is taken round by round. PyTorch's exact step runs "
        "its C kernels on a CPU and no compiler; JAX's steps are compiled. Where the command has "
        "`--cpu-time`, milliseconds and ratio are those of the shortest steps, in the time of the "
        "processor on one thread. With `--losses` the demo's GPT is trained in JAX under AdamW and "
        "a cosine, from the same weights on the same batches; the plain model evaluates both."
    ),
    arguments=_arguments,
    measure=_measure,
    rows=_rows,
    draw=_draw,
)
