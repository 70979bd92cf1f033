"""A JAX run that is stopped, saved by Orbax and resumed, beside one that is not."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from benchmarks._jax.measured_optimizers import training_step
from benchmarks._resumed import Bits, Resumed, first_difference
from benchmarks.workloads import Workload, load

Carry = tuple[Any, Any]
"""Parameters and optimizer state."""


class Run:
    """A freshly built optimizer with a step of its own, compiled anew.

    Args:
        tx: the optimizer.
        workload: what is trained.
    """

    def __init__(self, tx: optax.GradientTransformation, workload: Workload) -> None:
        self._tx, self._workload = tx, workload
        # A GPU adds in any order unless told not to; a CPU adds in the same order every time.
        on_gpu = jax.default_backend() == "gpu"
        options = {"xla_gpu_deterministic_ops": True} if on_gpu else None
        self._step = jax.jit(training_step(tx, workload), compiler_options=options)

    def start(self) -> Carry:
        """Weights of seed 0 and a fresh state."""
        params = self._workload.init(0)
        return params, jax.jit(self._tx.init)(params)

    def train(self, carry: Carry, batches: Iterable[Any]) -> Carry:
        """The carry after one step on each of the batches."""
        for batch in batches:
            carry = self._step(*carry, batch)
        return carry


def resume(
    make: Callable[[], optax.GradientTransformation],
    name: str,
    data: str | None = None,
    *,
    steps: int,
    stop: int,
    folder: Path,
) -> Resumed:
    """Trains without a stop; and stops, saves, builds everything anew, loads and goes on.

    Args:
        make: builds the optimizer.
        name: of the workload.
        data: its text file, if it is not the usual one.
        steps: of both runs.
        stop: steps before the stop, fewer than `steps`.
        folder: where the checkpoint goes; it has to be empty.
    """
    workload = load(name, data)
    batches = list(itertools.islice(workload.batches(0), steps))
    run = Run(make(), workload)
    whole = run.train(run.start(), batches)
    path = folder.resolve() / "checkpoint"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, run.train(run.start(), batches[:stop]))
    fresh = Run(make(), workload)
    with ocp.StandardCheckpointer() as checkpointer:
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh.start())
        loaded = checkpointer.restore(path, like)
    return Resumed(
        bytes_on_disk=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        first_difference=first_difference(
            leaves(whole), leaves(fresh.train(loaded, batches[stop:]))
        ),
    )


def leaves(carry: Carry) -> dict[str, Bits]:
    """What identifies each leaf's bits, by its path."""
    params, state = carry
    found = {}
    for path, leaf in jax.tree.leaves_with_path({"params": params, "state": state}):
        array = np.asarray(leaf)
        found[jax.tree_util.keystr(path)] = (str(array.dtype), array.shape, array.tobytes())
    return found
