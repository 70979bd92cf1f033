"""Time of one optimizer step, every optimizer in one interleaved run.

    python -m benchmarks.step_time --size 10m

Only the optimizer: update and apply, jitted, with parameters and state donated. The ratio to
`optax.adamw` is taken pair by pair, so that a machine whose speed drifts still gives the right one.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.progress import track
from rich.table import Table

from benchmarks._command import parser, publish
from benchmarks._environment import environment
from benchmarks._hlo import copied_bytes, host_calls, reads_of_parameters
from benchmarks._shapes import SIZES
from benchmarks._timing import cells, interleave, summary
from cruxy_optax import meta3, meta_lion

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "optax.adamw": lambda: optax.adamw(1e-3, weight_decay=0.01),
    "meta3": lambda: meta3(1e-3, weight_decay=0.01),
    "meta_lion": lambda: meta_lion(1e-4, weight_decay=0.1),
    "meta_lion bfloat16": lambda: meta_lion(1e-4, weight_decay=0.1, mu_dtype=jnp.bfloat16),
    "optax.lion": lambda: optax.lion(1e-4, weight_decay=0.1),
    "clip_by_global_norm + adamw": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.01)
    ),
}
REFERENCE = "optax.adamw"


class Step:
    """One optimizer's compiled step and the buffers it runs on."""

    def __init__(self, tx: optax.GradientTransformation, shapes: Any) -> None:
        """Compiles the step and fills its buffers."""
        extra = optax.with_extra_args_support(tx)

        def step(params: Any, state: Any, grads: Any, loss: jax.Array) -> Any:
            updates, state = extra.update(grads, state, params, value=loss)
            return optax.apply_updates(params, updates), state

        self.params = _normal(shapes, 0, 0.02)
        self.state = jax.jit(tx.init)(self.params)
        self.loss = jnp.float32(1.0)
        grads = _normal(shapes, 1, 0.01)
        # Arguments that are not used stay, so that parameter numbers in the program are known.
        jitted = jax.jit(step, donate_argnums=(0, 1), keep_unused=True)
        start = time.process_time()
        self.run = jitted.lower(self.params, self.state, grads, self.loss).compile()
        self.compile_seconds = time.process_time() - start
        self.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        self.inspect(len(jax.tree.leaves(self.params)), grads)

    def inspect(self, leaves: int, grads: Any) -> None:
        """Counts in the compiled program what the timings rest on."""
        text = self.run.as_text() or ""
        first = leaves + len(jax.tree.leaves(self.state))
        large = [i for i, g in enumerate(jax.tree.leaves(grads)) if g.size > 8192]
        reads = reads_of_parameters(text, {first + i for i in large})
        self.reads = statistics.mean(reads) if reads else float("nan")
        self.copied = copied_bytes(text)
        self.host_calls = host_calls(text)
        memory = self.run.memory_analysis()
        self.temporary = getattr(memory, "temp_size_in_bytes", 0)

    def time(self, grads: Any) -> float:
        """Seconds of one step, waited for."""
        start = time.perf_counter()
        self.params, self.state = self.run(self.params, self.state, grads, self.loss)
        jax.block_until_ready((self.params, self.state))
        return time.perf_counter() - start


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _draw(shape: tuple[int, ...], seed: int, scale: float) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), shape)


def _normal(shapes: Any, seed: int, scale: float) -> dict[str, jax.Array]:
    items = enumerate(shapes.items())
    return {name: _draw(shape, seed + 2 * i, scale) for i, (name, shape) in items}


def measure(size: str, repeats: int, names: list[str]) -> dict[str, Any]:
    """All figures of one parameter set.

    Args:
        size: a key of `SIZES`.
        repeats: interleaved rounds that count.
        names: keys of `OPTIMIZERS`; the reference is always among them.
    """
    shapes = SIZES[size]
    names = [REFERENCE, *(name for name in names if name != REFERENCE)]
    grads = _normal(shapes, 1, 0.01)
    count = sum(g.size for g in grads.values())
    steps = {
        name: Step(OPTIMIZERS[name](), shapes)
        for name in track(names, description=f"compiling for {count / 1e6:.1f}M parameters")
    }
    candidates = {name: functools.partial(step.time, grads) for name, step in steps.items()}
    rows = summary(interleave(candidates, repeats), REFERENCE)
    for name, step in steps.items():
        rows[name] |= {
            "state_bytes_per_parameter": step.state_bytes / count,
            "compile_ratio": step.compile_seconds / steps[REFERENCE].compile_seconds,
            "gradient_reads": step.reads,
            "copied_bytes": step.copied,
            "temporary_bytes": step.temporary,
            "host_calls": step.host_calls,
        }
    return {"size": size, "parameters": count, "repeats": repeats, "optimizers": rows}


def table(result: dict[str, Any]) -> Table:
    """The figures as a table."""
    title = (
        f"Optimizer step, {result['parameters'] / 1e6:.1f}M parameters, {result['repeats']} rounds"
    )
    shown = Table(title=title)
    shown.add_column("optimizer")
    for column in ("ms", "ratio", "quartiles", "state B/param", "compile", "g reads", "copied MB"):
        shown.add_column(column, justify="right")
    shown.add_column("host calls", justify="right")
    for name, row in result["optimizers"].items():
        shown.add_row(
            name,
            *cells(row),
            f"{row['state_bytes_per_parameter']:.3f}",
            f"{row['compile_ratio']:.2f}",
            f"{row['gradient_reads']:.1f}",
            f"{row['copied_bytes'] / 1e6:.1f}",
            str(row["host_calls"]),
        )
    return shown


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints a table and writes JSON."""
    options = parser("step_time", __doc__, OPTIMIZERS).parse_args(arguments)
    result = measure(options.size, options.repeats, options.optimizer or list(OPTIMIZERS))
    result["environment"] = environment()
    line = f"{result['environment']['device']}, jax {jax.__version__}"
    publish(result, table(result), options.output, line)


if __name__ == "__main__":
    main()
