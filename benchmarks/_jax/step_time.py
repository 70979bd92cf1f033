"""Times of JAX steps, every optimizer in one interleaved run, and what the compiled step holds.

Parameters and state are donated. An optimizer's step is update and apply alone.
"""

import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import track

from benchmarks._jax.hlo import copied_bytes, host_calls, reads_of_parameters
from benchmarks._jax.measured_optimizers import OPTIMIZERS, Step, training_step
from benchmarks._measured_optimizers import REFERENCE
from benchmarks._shapes import Shapes
from benchmarks._timing import interleave, summary
from benchmarks.workloads import load


class Timed:
    """A compiled step and the buffers it runs on.

    Its compile time is the processor's, and means something only where JAX's persistent compilation
    cache is off, as it is by default.

    Args:
        step: from parameters, state and `rest` to new parameters and new state.
        params: parameters; used up, as the state is.
        state: state.
        rest: further arguments, the same at every step.
    """

    def __init__(self, step: Step, params: Any, state: Any, *rest: Any) -> None:
        # Some optimizers keep the parameters themselves in their first state; no buffer can be
        # donated twice.
        self.params, self.state, self.rest = params, jax.tree.map(jnp.copy, state), rest
        # Arguments that are not used stay, so that parameter numbers in the program are known.
        jitted = jax.jit(step, donate_argnums=(0, 1), keep_unused=True)
        start = time.process_time()
        self.run = jitted.lower(self.params, self.state, *rest).compile()
        self.compile_seconds = time.process_time() - start

    def time(self, steps: int = 1) -> float:
        """Seconds of a step, of so many in a row of which the last is waited for."""
        start = time.perf_counter()
        for _ in range(steps):
            self.params, self.state = self.run(self.params, self.state, *self.rest)
        jax.block_until_ready((self.params, self.state))
        return (time.perf_counter() - start) / steps


def optimizer_steps(
    shapes: Shapes, repeats: int, names: Sequence[str], console: Console
) -> dict[str, dict[str, Any]]:
    """Times of the optimizers alone, and what was counted in their compiled steps.

    Args:
        shapes: of the parameters.
        repeats: interleaved rounds that count.
        names: keys of `OPTIMIZERS`, the reference among them.
        console: where progress is shown.
    """
    grads, loss = normal(shapes, 1, 0.01), jnp.float32(1.0)
    count = sum(g.size for g in grads.values())
    timed = {
        name: _alone(OPTIMIZERS[name].make(), shapes, grads, loss)
        for name in track(names, f"compiling for {count / 1e6:.1f}M parameters", console=console)
    }
    rows = summarized(timed, repeats, console)
    for name, step in timed.items():
        rows[name] |= counted(step, grads) | {
            "compile_ratio": step.compile_seconds / timed[REFERENCE].compile_seconds
        }
    return rows


def training_steps(
    name: str, data: str | None, repeats: int, names: Sequence[str], console: Console
) -> dict[str, dict[str, Any]]:
    """Times of whole training steps: batch to the device, forward, backward and optimizer.

    Args:
        name: of the workload, which is trained on its first batch over and over.
        data: its text file, if it is not the usual one.
        repeats: interleaved rounds that count.
        names: keys of `OPTIMIZERS`, the reference among them.
        console: where progress is shown.
    """
    workload = load(name, data)
    batch = next(workload.batches(0))
    timed = {}
    for optimizer in track(names, f"compiling {name}", console=console):
        tx, params = OPTIMIZERS[optimizer].make(), workload.init(0)
        timed[optimizer] = Timed(training_step(tx, workload), params, tx.init(params), batch)
    return summarized(timed, repeats, console)


def summarized(
    timed: Mapping[str, Timed], repeats: int, console: Console
) -> dict[str, dict[str, Any]]:
    """Interleaved times by name, with the optimizer's label."""
    seconds = interleave({name: step.time for name, step in timed.items()}, repeats, console)
    rows = summary(seconds, REFERENCE)
    return {name: {"label": OPTIMIZERS[name].label, **row} for name, row in rows.items()}


def counted(timed: Timed, grads: Any) -> dict[str, Any]:
    """What the timings of an optimizer's step rest on: state, and traffic in its program.

    Args:
        timed: the step; its first argument after the state is `grads`.
        grads: the gradients.
    """
    text = timed.run.as_text() or ""
    state = jax.tree.leaves(timed.state)
    first = len(jax.tree.leaves(timed.params)) + len(state)
    leaves = jax.tree.leaves(grads)
    # Small leaves are read as the compiler likes, and none of it can be measured.
    reads = reads_of_parameters(text, {first + i for i, g in enumerate(leaves) if g.size > 8192})
    return {
        "state_bytes_per_parameter": sum(x.nbytes for x in state) / sum(g.size for g in leaves),
        "gradient_reads": statistics.mean(reads) if reads else float("nan"),
        "copied_bytes": copied_bytes(text),
        "temporary_bytes": getattr(timed.run.memory_analysis(), "temp_size_in_bytes", 0),
        "host_calls": host_calls(text),
    }


def _alone(tx: optax.GradientTransformation, shapes: Shapes, grads: Any, loss: jax.Array) -> Timed:
    extra = optax.with_extra_args_support(tx)

    def step(params: Any, state: Any, grads: Any, loss: jax.Array) -> tuple[Any, Any]:
        updates, state = extra.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    params = normal(shapes, 0, 0.02)
    return Timed(step, params, jax.jit(tx.init)(params), grads, loss)


def normal(shapes: Shapes, seed: int, scale: float) -> dict[str, jax.Array]:
    """Normal float32 arrays by name."""
    items = enumerate(shapes.items())
    return {name: _draw(shape, seed + 2 * i, scale) for i, (name, shape) in items}


@functools.partial(jax.jit, static_argnums=0)  # one program for all tensors of a shape
def _draw(shape: tuple[int, ...], seed: int, scale: float) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), shape)
