"""What is measured of JAX on a GPU: compiled steps, and trajectories to be compared."""

import functools
import gc
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._jax.hlo import launched
from benchmarks._jax.measured_optimizers import OPTIMIZERS
from benchmarks._jax.step_time import Timed, counted, normal
from benchmarks._shapes import Shapes
from cruxy_optax import meta3, meta_lion, self_driving

TOGETHER = 5
"""Steps in a row, of which only the last is waited for: the host is ahead of the device then."""


def there() -> str:
    """Why nothing can be measured here; empty where there is a GPU."""
    return "" if jax.default_backend() == "gpu" else f"JAX {jax.__version__} finds no GPU"


def stepped(name: str, shapes: Shapes, repeats: int) -> dict[str, Any]:
    """The time of an optimizer's compiled step, and what was counted in its program."""
    tx = optax.with_extra_args_support(OPTIMIZERS[name].make())
    params, grads = normal(shapes, 0, 0.02), normal(shapes, 1, 0.001)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params, value=jnp.float32(1.0))
        return optax.apply_updates(params, updates), state

    timed = Timed(step, params, tx.init(params), grads)
    for _ in range(3):
        timed.time()
    rounds = max(1, repeats // TOGETHER)
    seconds = statistics.median(timed.time(TOGETHER) for _ in range(rounds))
    count = counted(timed, grads)
    return {
        "label": OPTIMIZERS[name].label,
        "milliseconds": 1e3 * seconds,
        "state_bytes_per_parameter": count["state_bytes_per_parameter"],
        "gradient_reads": count["gradient_reads"],
        "launches": launched(timed.run.as_text() or ""),
    }


def trajectory(name: str, shapes: Shapes, steps: int, decay: float) -> dict[str, Any]:
    """The parameters after steps on gradients that are the same everywhere."""
    draw = np.random.default_rng(0)
    params = {key: jnp.asarray(_drawn(draw, shape, 0.02)) for key, shape in shapes.items()}
    made = {
        "meta3": lambda: meta3(1e-3, b2=0.999, weight_decay=decay),
        "meta_lion": lambda: meta_lion(1e-4, b1=0.9, b2=0.99, weight_decay=decay),
        "self_driving": lambda: self_driving(weight_decay=decay),
    }
    tx = optax.with_extra_args_support(made[name]())
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, grads: Any, loss: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    for number in range(steps):
        grads = {key: jnp.asarray(_drawn(draw, shape, 0.01)) for key, shape in shapes.items()}
        params, state = step(params, state, grads, jnp.float32(1.0 / (1 + number)))
    return {key: np.asarray(value) for key, value in params.items()}


def _drawn(draw: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    return (scale * draw.standard_normal(shape)).astype(np.float32)


def on_device(function: Callable[..., dict[str, Any]], *arrays: np.ndarray) -> dict[str, Any]:
    """What a function over an array namespace gives there, compiled, as NumPy's arrays."""
    found = jax.jit(functools.partial(function, xp=jnp))(*map(jnp.asarray, arrays))
    return {name: np.asarray(value) for name, value in found.items()}


def forget() -> None:
    """Lets go of arrays and compiled programs."""
    gc.collect()
    jax.clear_caches()
