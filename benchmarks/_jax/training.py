"""Training runs in JAX: scanned in chunks of steps, several rates and seeds at once if wanted."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._jax.faults import CORRUPTIONS, Corruption
from benchmarks._jax.our_optimizers import OPTIMIZERS
from benchmarks._runs import Record, Task
from benchmarks.faults import FAULTS
from benchmarks.workloads import load

LONGEST_CHUNK = 50
"""Steps in one compiled call; more would only hide how far a run is."""


def train(tasks: Sequence[Task]) -> list[Record]:
    """Runs tasks that differ in rate and seed alone; several run at once, vectorised.

    Args:
        tasks: at least one.

    Returns:
        A record each, in order.
    """
    task, lanes = tasks[0], len(tasks)
    if any(other._replace(rate=task.rate, seed=task.seed) != task for other in tasks):
        raise ValueError("tasks run together must differ in rate and seed alone.")
    began = time.perf_counter()
    programs = _Programs.of(task._replace(rate=0.0, seed=0), lanes)
    rates = jnp.array([t.rate for t in tasks], jnp.float32)
    seeds = [t.seed for t in tasks]
    workload = load(task.workload, task.data)
    fault = CORRUPTIONS.get(task.fault, Corruption())
    strikes = set() if task.fault == "none" else set(FAULTS[task.fault].strikes(task.steps))
    streams = {seed: workload.batches(seed) for seed in seeds}
    initial = {seed: workload.init(seed) for seed in set(seeds)}
    params = _stack([initial[seed] for seed in seeds])
    start = np.asarray(programs.held_out(params))
    carry = programs.begin(params, rates)
    chunk = _chunk(task)
    held_out: list[np.ndarray] = []
    losses: list[np.ndarray] = []
    for first in range(0, task.steps, chunk):
        steps = range(first, first + chunk)
        drawn: dict[int, list[Any]] = {seed: [] for seed in streams}
        for step in steps:
            for seed, stream in streams.items():
                batch = next(stream)
                drawn[seed].append(fault.batch(batch) if step in strikes else batch)
        batches = _stack([_stack(drawn[seed]) for seed in seeds])
        hit = jnp.array([step in strikes for step in steps])
        carry, chunk_losses = programs.take_steps(carry, rates, batches, hit)
        losses.append(np.asarray(chunk_losses))
        if steps.stop in task.evaluate_at:
            held_out.append(np.asarray(programs.held_out(programs.averaged(carry))))
    finite, skipped = jax.device_get(programs.inspect(carry))
    state_bytes = _bytes(carry[1]) / _count(carry[0])
    seconds = (time.perf_counter() - began) / lanes
    all_losses = np.concatenate(losses, axis=1)
    return [
        Record(
            start=float(start[i]),
            held_out=tuple(_or_nan(row[i]) for row in held_out),
            losses=tuple(float(value) for value in all_losses[i]),
            finite=bool(finite[i]),
            skipped=None if skipped is None else int(skipped[i]),
            state_bytes_per_parameter=state_bytes,
            seconds=seconds,
        )
        for i in range(lanes)
    ]


def _or_nan(value: Any) -> float:
    return float(value) if np.isfinite(value) else math.nan


def _chunk(task: Task) -> int:
    """The longest chunk that ends at every step at which something is evaluated."""
    common = math.gcd(*task.evaluate_at)
    return max(size for size in range(1, LONGEST_CHUNK + 1) if common % size == 0)


class _Programs(NamedTuple):
    """The compiled functions of one optimizer on one workload; a leading axis counts the lanes.

    Attributes:
        begin: parameters and rates to the carry, which is (parameters, optimizer state).
        take_steps: carry, rates, batches with axes (lane, step, ...) and which steps are hit by
            the fault, to the new carry and the losses, (lane, step).
        averaged: the parameters to evaluate at, which a few optimizers keep apart.
        held_out: parameters to the workload's figure.
        inspect: carry to (whether every number is finite, steps skipped by a guard or `None`).
    """

    begin: Callable[..., Any]
    take_steps: Callable[..., Any]
    averaged: Callable[..., Any]
    held_out: Callable[..., Any]
    inspect: Callable[..., Any]

    @classmethod
    @functools.cache
    def of(cls, task: Task, lanes: int) -> "_Programs":
        """Programs for all tasks that differ in rate and seed alone."""
        optimizer, workload = OPTIMIZERS[task.optimizer], load(task.workload, task.data)
        corrupt = None if task.fault == "none" else CORRUPTIONS[task.fault].gradients
        over_lanes = jax.vmap if lanes > 1 else _one_lane

        def transformation(rate: jax.Array) -> optax.GradientTransformationExtraArgs:
            return optax.with_extra_args_support(optimizer.make(rate, task.steps))

        def begin(params: Any, rate: jax.Array) -> Any:
            # Copies, since the carry is donated and the parameters are not.
            return jax.tree.map(jnp.copy, params), transformation(rate).init(params)

        def take_steps(carry: Any, rate: jax.Array, batches: Any, hit: jax.Array) -> Any:
            def step(carry: Any, inputs: Any) -> Any:
                (params, state), (batch, hit) = carry, inputs
                loss, grads = jax.value_and_grad(workload.loss)(params, batch)
                if corrupt is not None:
                    bad = corrupt(grads)
                    grads = jax.tree.map(lambda b, g: jnp.where(hit, b, g), bad, grads)
                updates, state = transformation(rate).update(grads, state, params, value=loss)
                return (optax.apply_updates(params, updates), state), loss

            return jax.lax.scan(step, carry, (batches, hit))

        def steps_of_lanes(carry: Any, rates: Any, batches: Any, hit: jax.Array) -> Any:
            return over_lanes(lambda c, r, b: take_steps(c, r, b, hit))(carry, rates, batches)

        def inspect(carry: Any) -> Any:
            leaves = [x for x in jax.tree.leaves(carry) if jnp.issubdtype(x.dtype, jnp.inexact)]
            # A scalar may be infinite on purpose, such as the threshold of a law that never clips.
            bad = [jnp.isnan(x) if x.ndim == 0 else ~jnp.isfinite(x).all() for x in leaves]
            finite = ~jnp.any(jnp.array(bad))
            return finite, optimizer.skipped(carry[1])

        return cls(
            begin=jax.jit(over_lanes(begin)),
            take_steps=jax.jit(steps_of_lanes, donate_argnums=0),
            averaged=jax.jit(over_lanes(lambda carry: optimizer.averaged(carry[1], carry[0]))),
            held_out=jax.jit(over_lanes(workload.held_out)),
            inspect=jax.jit(over_lanes(inspect)),
        )


def _one_lane(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.vmap` for a single lane: a batch axis of one would cost time for nothing."""

    def run(*arguments: Any) -> Any:
        result = function(*jax.tree.map(lambda x: x[0], arguments))
        return jax.tree.map(lambda x: x[None], result)

    return run


def _stack(trees: Sequence[Any]) -> Any:
    """One tree of arrays with a new leading axis; stays in NumPy where everything is."""
    leaves = jax.tree.leaves(trees)
    stack = np.stack if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp.stack
    return jax.tree.map(lambda *same: stack(same), *trees)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
