"""Training runs in JAX on several workers of one process, each with its share of every batch."""

import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._jax.our_optimizers import WIRED
from benchmarks._jax.wired_optimizers import AXIS, Wired
from benchmarks._runs import Record, Task
from benchmarks.workloads import load


def train(tasks: Sequence[Task]) -> list[Record]:
    """Runs tasks whose optimizer is one of `WIRED`, one after the other.

    Args:
        tasks: of the framework "jax", without a fault.

    Returns:
        A record each, in order.

    Raises:
        ValueError: if there is a fault, or a batch cannot be split evenly.
    """
    return [_train(task, WIRED[task.optimizer]) for task in tasks]


def _train(task: Task, entry: Wired) -> Record:
    if task.fault != "none":
        raise ValueError(f"a fault must be 'none' on a wire, got {task.fault!r}; leave it out.")
    began = time.perf_counter()
    workload, workers = load(task.workload, task.data), entry.workers
    tx = optax.with_extra_args_support(entry.make(jnp.float32(task.rate), task.steps))

    def begin(params: Any) -> Any:
        # A worker's index is what its state is laid out by, and nothing in it.
        return jax.vmap(lambda _: tx.init(params), axis_name=AXIS)(jnp.arange(workers))

    def on_worker(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(workload.loss)(params, batch)
        updates, state = tx.update(grads, state, params, value=loss)
        return updates, state, loss

    def step(params: Any, state: Any, batch: Any) -> Any:
        shares = jax.tree.map(lambda x: x.reshape(workers, -1, *x.shape[1:]), batch)
        lanes = jax.vmap(on_worker, in_axes=(None, 0, 0), axis_name=AXIS)
        updates, state, losses = lanes(params, state, shares)
        updates = jax.tree.map(lambda u: u[0], updates)  # the same on all
        return optax.apply_updates(params, updates), state, losses.mean()

    step, held_out = jax.jit(step, donate_argnums=(0, 1)), jax.jit(workload.held_out)
    params = jax.tree.map(jnp.copy, workload.init(task.seed))
    state = jax.jit(begin)(params)
    start, figures, losses = float(held_out(params)), [], []
    for taken, batch in zip(range(1, task.steps + 1), workload.batches(task.seed), strict=False):
        _check(batch, workers)
        params, state, loss = step(params, state, batch)
        losses.append(loss)
        if taken in task.evaluate_at:
            figures.append(float(held_out(params)))
    first = jax.tree.map(lambda x: x[0], state)
    leaves = jax.tree.leaves(params)
    return Record(
        start=start,
        held_out=tuple(value if math.isfinite(value) else math.nan for value in figures),
        losses=tuple(float(loss) for loss in losses),
        finite=all(bool(jnp.isfinite(leaf).all()) for leaf in leaves),
        skipped=int(entry.skipped(first)),
        state_bytes_per_parameter=sum(leaf.nbytes for leaf in jax.tree.leaves(first))
        / sum(leaf.size for leaf in leaves),
        seconds=time.perf_counter() - began,
    )


def _check(batch: Any, workers: int) -> None:
    sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch)}
    if any(size % workers for size in sizes):
        raise ValueError(
            f"a batch must be split evenly among {workers} workers, got {sorted(sizes)} examples; "
            "take another workload."
        )
