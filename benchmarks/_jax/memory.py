"""Bytes of JAX optimizers: state by its shapes, and the peak of a compiled training step."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._jax.measured_optimizers import OPTIMIZERS, training_step
from benchmarks._shapes import Shapes
from benchmarks.workloads import load
from cruxy_optax import estimate_memory


def state_bytes(name: str, shapes: Shapes) -> int:
    """Bytes of an optimizer's state; nothing is allocated.

    Args:
        name: a key of `OPTIMIZERS`.
        shapes: of the parameters, which are float32.
    """
    params: Any = {leaf: jax.ShapeDtypeStruct(shape, jnp.float32) for leaf, shape in shapes.items()}
    return estimate_memory(OPTIMIZERS[name].make(), params).state


def peak_bytes(name: str, trained: str, data: str | None) -> int | None:
    """What a training step with donated parameters and state holds at most; it is not run.

    Args:
        name: a key of `OPTIMIZERS`.
        trained: the workload.
        data: its text file, if it is not the usual one.
    """
    tx, workload = OPTIMIZERS[name].make(), load(trained, data)
    params = jax.eval_shape(lambda: workload.init(0))
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype)),
        next(workload.batches(0)),
    )
    step = jax.jit(training_step(tx, workload), donate_argnums=(0, 1))
    return estimate_memory(params, tx, train_step=step, args=(batch,)).peak
