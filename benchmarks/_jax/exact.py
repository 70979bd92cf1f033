"""Exact and plain steps of the reference GPT in JAX."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cruxy_exact.engines import Precision
from cruxy_exact.reference import Reference
from cruxy_optax import exact


def steps(
    size: Mapping[str, Any], engines: Sequence[str], *, cpu_time: bool = False
) -> tuple[dict[str, Callable[[], float]], int]:
    """What is timed, by name, and the number of parameters.

    Args:
        size: fields of `Reference`.
        engines: of the exact products.
        cpu_time: whether one thread works and the processor's time counts, not the clock's.

    Returns:
        Functions that take a step and return its seconds; `"plain"` is one of them.
    """
    clock = time.process_time if cpu_time else time.perf_counter
    like = jnp.zeros(1, jnp.float32)
    reference = Reference(**size)
    found = {"plain": _timed(exact.plain_step(reference, like), clock)}
    for engine in engines:
        chosen = Reference(**size, precision=Precision(engine=engine))
        found[engine] = _timed(_exact_step(chosen), clock)
    return found, sum(p.size for p in _initial(reference).values())


def _initial(reference: Reference) -> dict[str, jax.Array]:
    with jax.enable_x64(True):
        return reference.init(jnp.zeros(1, jnp.float32), xp=jnp)


def _exact_step(reference: Reference) -> Callable[[int], None]:
    clip = exact.clip_by_global_norm(reference.clip)
    tx: Any = optax.chain(clip, exact.adamw(reference.lr))
    params = _initial(reference)
    state = tx.init(params)

    @jax.jit
    def take(params: Any, state: Any, x: Any, y: Any, count: Any) -> Any:
        grads = jax.grad(lambda p: exact.reference_loss(reference, p, x, y, count))(params)
        updates, state = tx.update(grads, state, params)
        return exact.apply_updates(params, updates), state

    def run(count: int) -> None:
        nonlocal params, state
        with jax.enable_x64(True):
            x, y = reference.data(count, jnp.zeros(1, jnp.float32), xp=jnp)
        params, state = take(params, state, x, y, jnp.int32(count))
        jax.block_until_ready(params)

    return run


def _timed(step: Callable[[int], Any], clock: Callable[[], float]) -> Callable[[], float]:
    count = 0

    def call() -> float:
        nonlocal count
        begun = clock()
        step(count)
        count += 1
        return clock() - begun

    return call
