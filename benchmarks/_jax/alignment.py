"""The alignment of gradient and momentum along training runs at constant rates."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._jax.workloads.shakespeare import shakespeare
from benchmarks._rates import RATES, scaled
from benchmarks.workloads import Workload
from benchmarks.workloads.shakespeare import MODELS
from cruxy_control import SelfDriving
from cruxy_optax import (
    scale_by_controlled_adam,
    scale_by_controlled_lion,
    scale_by_controlled_muon,
    scale_by_meta_learning_rate,
    stabilize,
)

DIRECTIONS = {
    "Adam": (lambda: scale_by_controlled_adam(0.9, 0.99), 1.0),
    "Lion": (lambda: scale_by_controlled_lion(0.9, 0.95), 0.1),
    "Muon": (scale_by_controlled_muon, 1.0),
    "momentum SGD": (lambda: optax.trace(0.9), 3.0),
}
"""How a gradient becomes a step, and the scale of the grid of rates to `RATES`."""

OBSERVER = SelfDriving(gain=0.0, clip_threshold=None)
"""Measures and orders nothing."""


def widened(name: str, width: int) -> Workload:
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


def curve(
    workload: Workload, direction: str, share: float, steps: int, watched: int
) -> dict[str, Any]:
    """Alignment and loss at every rate of one grid, from the same start and batches.

    Args:
        workload: what is trained.
        direction: a key of `DIRECTIONS`.
        share: the size of the batch, relative to the workload's.
        steps: of each run.
        watched: over how many of the last steps alignment and loss are averaged.
    """
    batches = [batch for batch, _ in zip(_resized(workload, share), range(steps), strict=False)]
    stacked = jax.tree.map(lambda *same: np.stack(same), *batches)
    rates = scaled(RATES, DIRECTIONS[direction][1])
    run = jax.jit(functools.partial(_run, workload, direction))
    traces = [run(workload.init(0), jnp.float32(rate), stacked) for rate in rates]
    losses = [float(jnp.mean(loss[-watched:])) for loss, _ in traces]
    start = float(traces[0][0][0])
    return {
        "workload": workload.name,
        "direction": direction,
        "batch": _examples(batches[0]),
        "rates": list(rates),
        "losses": [loss if np.isfinite(loss) else start for loss in losses],
        "alignments": [float(jnp.nanmean(alignment[-watched:])) for _, alignment in traces],
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
