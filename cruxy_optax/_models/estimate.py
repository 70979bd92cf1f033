"""`estimate_memory`: what a run will need, from a tree of parameters or the name of a model."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cruxy_control.memory import loaded_bytes
from cruxy_control.tiers import parse_bytes
from cruxy_optax._memory.estimate import MemoryEstimate, count_memory, shape_of, tree_bytes
from cruxy_optax._models.skeleton import sizes_of, skeleton
from cruxy_optax._optimizers.axiom import axiom
from cruxy_optax._optimizers.self_driving import self_driving


def estimate_memory(
    model: optax.Params | str | Path,
    tx: optax.GradientTransformation | None = None,
    *,
    train_step: Callable[..., Any] | jax.stages.Lowered | jax.stages.Compiled | None = None,
    args: Sequence[Any] = (),
    device_memory: int | str | None = None,
) -> MemoryEstimate:
    """Says what training will take, before anything is allocated.

    Parameters, gradients and state are counted from shapes and are exact. Given a training step,
    it is compiled, not run, and XLA's own analysis gives the peak of that program: activations,
    gradients and whatever the compiler keeps at once. What else lives on the device, such as the
    next batch, is not in it.

    Args:
        model: the parameters, or `jax.ShapeDtypeStruct`s of them, as `jax.eval_shape` gives; or a
            folder with safetensors or a name on the hub, of which the headers are read and no
            weights, and whose parameters then count in bfloat16.
        tx: the optimizer; any optax transformation, `axiom()` where there is none. The two may
            stand in either order.
        train_step: called as `train_step(params, opt_state, *args)`. Where it is not under
            `jax.jit` it is compiled without donating anything; with
            `jax.jit(step, donate_argnums=(0, 1))` the new parameters and state take the place of
            the old ones, as they should. A step with other arguments is given lowered or compiled,
            `jax.jit(step).lower(...)`.
        args: further arguments of the step, such as a batch; arrays or `jax.ShapeDtypeStruct`s.
        device_memory: of the device to compare with, in bytes or as a text such as `"8GB"`; by
            default what JAX says of the first local device, which says nothing of a CPU.

    Returns:
        The bytes. Those of parameters, gradients and state are of all devices together; those of
        the compiled step are of one device. `estimate["fp16_gb"]`, `["int8_gb"]` and `["int4_gb"]`
        are gigabytes of the weights with matrices inside the model in so many bits, and
        `["recommendation"]` the first way to train that fits the device.

    Raises:
        TypeError: where there are no parameters, `train_step` cannot be called, or `args` come with
            a step that has its own already.
        ValueError: where the compiler's backend gives no analysis.
        ImportError: where a name needs a package that is not installed.
        OSError: where there is no model of that name.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, cruxy_optax
        >>> params = {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
        >>> tx = optax.adamw(1e-3)
        >>> print(cruxy_optax.estimate_memory(params, tx))
                                                         bytes   a parameter
        parameters                                   1,048,576         4.000
        gradients                                    1,048,576         4.000
        optimizer state                              2,097,156         8.000
        >>> def step(params, opt_state, x):
        ...     grads = jax.grad(lambda p: jnp.sum((x @ p["w"]) ** 2))(params)
        ...     updates, opt_state = tx.update(grads, opt_state, params)
        ...     return optax.apply_updates(params, updates), opt_state
        >>> step = jax.jit(step, donate_argnums=(0, 1))
        >>> batch = jax.ShapeDtypeStruct((8, 512), jnp.float32)
        >>> memory = cruxy_optax.estimate_memory(params, tx, train_step=step, args=(batch,))
        >>> memory.arguments - memory.reused == batch.size * 4
        True
    """
    source: Any = model
    if isinstance(source, optax.GradientTransformation):
        source, tx = tx, source
    if source is None or (tx is not None and not isinstance(tx, optax.GradientTransformation)):
        raise TypeError(
            "estimate_memory needs parameters or the name of a model, and takes an optax "
            f"transformation beside them, got {type(source).__name__} and {type(tx).__name__}; "
            "call estimate_memory(params, tx)."
        )
    if isinstance(source, str | Path):
        source = skeleton(source)
    params = jax.tree.map(shape_of, source)
    counted = count_memory(axiom() if tx is None else tx, params, train_step, args)
    return dataclasses.replace(
        counted,
        device_bytes=_device_bytes(device_memory),
        find_model=functools.partial(sizes_of, params),
        find_ways=functools.partial(_ways, params),
    )


def _device_bytes(device_memory: int | str | None) -> int | None:
    if device_memory is not None:
        return parse_bytes("device_memory", device_memory)
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("bytes_limit")


def _ways(params: Any) -> dict[str, int]:
    """Bytes of the ways to train a model, from what trains best to what takes least."""
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    sizes = sizes_of(half)
    halves = loaded_bytes(sizes, 16)
    driving, least = self_driving(state_bits=8), axiom()
    largest = max((2 * leaf.size for leaf in jax.tree.leaves(half)), default=0)
    return {
        "optax.adamw, float32": 16 * sizes.count,
        "self_driving(state_bits=8), bfloat16": 2 * halves
        + tree_bytes(jax.eval_shape(driving.init, half)),
        "axiom with released gradients, bfloat16": halves
        + largest
        + tree_bytes(jax.eval_shape(least.init, half)),
    }
