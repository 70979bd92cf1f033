"""What the self-driving law senses: the alignment of gradient and momentum against the rate."""

import argparse
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks._jax.optimizers import RATES
from benchmarks._jax.workloads.shakespeare import MODELS, shakespeare
from benchmarks._plots import finish
from benchmarks._protocol import Protocol, Rows
from benchmarks.workloads import ALONE, NAMES, Workload, load
from cruxy_control import SelfDriving
from cruxy_optax import (
    scale_by_controlled_adam,
    scale_by_controlled_lion,
    scale_by_meta_learning_rate,
    stabilize,
)

DIRECTIONS = {
    "Adam": (lambda: scale_by_controlled_adam(0.9, 0.99), 1.0),
    "Lion": (lambda: scale_by_controlled_lion(0.9, 0.95), 0.1),
    "momentum SGD": (lambda: optax.trace(0.9), 3.0),
}
"""How a gradient becomes a step, and the scale of the grid of rates to `RATES`."""

WATCHED = 100
"""The alignment and the loss are means over this many last steps."""

OBSERVER = SelfDriving(gain=0.0, clip_threshold=None)
"""Measures and orders nothing."""


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
        choices=list(DIRECTIONS),
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


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    if options.steps <= WATCHED:
        raise ValueError(f"--steps must be above {WATCHED}, got {options.steps}.")
    if min(options.share) <= 0.0:
        raise ValueError(f"--share must be above 0, got {min(options.share)}.")
    workloads = [
        (width, load(name) if width is None else _widened(name, width))
        for name in options.workload
        for width in options.width or [None]
    ]
    curves = []
    for width, workload in workloads:
        for direction in options.direction:
            for share in options.share:
                console.print(f"{_shown(workload.name, width)}, {direction}, batch times {share:g}")
                curve = _curve(workload, direction, share, options.steps)
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


def _widened(name: str, width: int) -> Workload:
    """A language model as wide as that.

    Raises:
        ValueError: if it is none, or its heads do not divide the width.
    """
    family, _, size = name.partition("-")
    if family != "shakespeare":
        raise ValueError(f"--width is for the language models, got {name}; leave it out.")
    heads = MODELS[size].config.heads
    if width < 1 or width % heads:
        raise ValueError(f"--width must be a multiple of the {heads} heads of {name}, got {width}.")
    return shakespeare(size, width=width)


def _curve(workload: Workload, direction: str, share: float, steps: int) -> dict[str, Any]:
    """Alignment and loss at every rate of one grid, from the same start and batches."""
    batches = [batch for batch, _ in zip(_resized(workload, share), range(steps), strict=False)]
    stacked = jax.tree.map(lambda *same: np.stack(same), *batches)
    _, scale = DIRECTIONS[direction]
    rates = [float(f"{scale * rate:.6g}") for rate in RATES]
    run = jax.jit(functools.partial(_run, workload, direction))
    traces = [run(workload.init(0), jnp.float32(rate), stacked) for rate in rates]
    losses = [float(jnp.mean(loss[-WATCHED:])) for loss, _ in traces]
    start = float(traces[0][0][0])
    return {
        "workload": workload.name,
        "direction": direction,
        "batch": _examples(batches[0]),
        "rates": rates,
        "losses": [loss if np.isfinite(loss) else start for loss in losses],
        "alignments": [float(jnp.nanmean(alignment[-WATCHED:])) for _, alignment in traces],
    }


def _resized(workload: Workload, share: float) -> Iterator[Any]:
    """The workload's batches with `share` times as many examples each."""
    stream = workload.batches(0)
    parts = [next(stream)]
    rows = max(1, round(share * _examples(parts[0])))
    while True:
        while sum(map(_examples, parts)) < rows:
            parts.append(next(stream))
        yield jax.tree.map(lambda *same: np.concatenate(same)[:rows], *parts)
        parts = [next(stream)]


def _examples(batch: Any) -> int:
    return len(jax.tree.leaves(batch)[0])


def _run(workload: Workload, direction: str, params: Any, rate: jax.Array, batches: Any) -> Any:
    """Losses and alignments of all steps at a constant rate."""
    tx = stabilize(
        optax.chain(DIRECTIONS[direction][0](), scale_by_meta_learning_rate(rate)), OBSERVER
    )

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        loss, grads = jax.value_and_grad(workload.loss)(params, batch)
        new: Any
        updates, new = tx.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), new), (loss, new.signals.alignment)

    return jax.lax.scan(step, (params, tx.init(params)), batches)[1]


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
