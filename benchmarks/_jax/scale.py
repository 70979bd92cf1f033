"""What a JAX optimizer's step sends between devices and holds, compiled for a mesh and not run."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import cruxy_optax
from benchmarks._counted import Task, counted
from benchmarks._jax.hlo import axes_of, collectives
from benchmarks._models import MODELS, count, split, tensors
from benchmarks._wire import Message

OPTIMIZERS: dict[str, tuple[str, Callable[..., optax.GradientTransformation]]] = {
    "adamw": ("AdamW", lambda **_: optax.adamw(1e-3)),
    "adamw-clipped": (
        "AdamW, clipped",
        lambda **_: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    ),
    "adafactor": ("Adafactor", lambda **_: optax.adafactor(1e-3)),
    "muon": ("Muon", lambda **_: optax.contrib.muon(1e-3)),
    "meta3": ("Meta3", lambda **_: cruxy_optax.meta3(1e-3)),
    "meta_lion": ("Meta-Lion", lambda **_: cruxy_optax.meta_lion(1e-4)),
    "self_driving": ("Self-driving", lambda **_: cruxy_optax.self_driving()),
    "self_driving_muon": (
        "Self-driving Muon",
        lambda stacked, **_: cruxy_optax.self_driving_muon(stacked=stacked),
    ),
    "axiom": ("AXIOM", lambda **_: cruxy_optax.axiom(1e-3)),
    "cosmic": (
        "COSMIC, 4 bytes",
        lambda elements, **_: cruxy_optax.cosmic(1e-3, state_budget=4 * elements),
    ),
    "tiger": ("Tiger", lambda **_: cruxy_optax.tiger(1e-4)),
}
"""Label and maker by name; `stacked` has the paths of stacked layers, `elements` their number in
all parameters."""


STAGES = ("trace", "lower", "compile")
"""What is timed apart."""


AUTOMATIC = ("muon",)
"""What multiplies matrices without a word on how the product is split: explicit axes refuse it."""


def measured(
    mesh: Mapping[str, int], tasks: Sequence[Task], *, patience: float
) -> Iterator[dict[str, Any]]:
    """What each step takes on a device; see `counted`."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if "device_count" not in flag]
    devices = f"--xla_force_host_platform_device_count={math.prod(mesh.values())}"
    here = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*flags, devices]),
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }
    return counted(compiled, mesh, tasks, patience=patience, variables=here)


def compiled(task: Task, mesh: Mapping[str, int]) -> dict[str, Any]:
    """What a step of an optimizer takes on each of the devices, which this process has to have."""
    name, model, stacked = task
    sizes = tuple(mesh.values())
    explicit = jax.make_mesh(sizes, tuple(mesh), axis_types=(AxisType.Explicit,) * len(sizes))
    kind = AxisType.Auto if name in AUTOMATIC else AxisType.Explicit
    used = jax.make_mesh(sizes, tuple(mesh), axis_types=(kind,) * len(sizes))
    parameters = tensors(MODELS[model], stacked=stacked)
    flat = {
        path: jax.ShapeDtypeStruct(
            own.shape,
            jnp.float32,
            sharding=NamedSharding(explicit, PartitionSpec(*split(own, mesh))),
        )
        for path, own in parameters.items()
    }
    _, make = OPTIMIZERS[name]
    made = make(stacked=("layers.*",) if stacked else (), elements=count(parameters))
    tx = optax.with_extra_args_support(made)
    params = _nested(flat)
    with jax.set_mesh(explicit):
        state = jax.eval_shape(tx.init, params)

    def on_the_mesh(leaf: Any) -> Any:
        spec = leaf.sharding.spec if leaf.sharding is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(used, PartitionSpec(*spec))
        )

    params, state = jax.tree.map(on_the_mesh, (params, state))
    places = jax.tree.map(lambda leaf: leaf.sharding, (params, state))

    def step(params: Any, state: Any, grads: Any, loss: jax.Array) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    loss = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(used, PartitionSpec()))
    # Of no step: what the compiler makes ready once, and what a step before has left.
    jax.clear_caches()
    jax.jit(jnp.negative).lower(loss).compile()
    # Of the CPU, of all threads: a machine that others use too gives less of it in a second.
    times = [time.process_time()]
    with jax.set_mesh(used):
        traced = jax.jit(step, donate_argnums=(0, 1, 2), out_shardings=places).trace(
            params, state, params, loss
        )
        times.append(time.process_time())
        lowered = traced.lower()
        times.append(time.process_time())
        done = lowered.compile()
        times.append(time.process_time())
    memory: Any = done.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    text = done.as_text() or ""
    messages = [
        Message(one.operation, one.bytes, axes_of(one.devices, mesh), len(one.devices), one.times)
        for one in collectives(text)
    ]
    return {
        "tensors": len(flat),
        "axis_types": kind.name.lower(),
        "parameter_bytes": _bytes(params),
        "gradient_bytes": _bytes(params),
        "state_bytes": _bytes(state),
        "peak_bytes": held - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        "messages": [message._asdict() for message in messages],
        "cpu_seconds": dict(zip(STAGES, np.diff(times).tolist(), strict=True)),
    }


def _bytes(tree: Any) -> int:
    """Of what one device holds."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += jax.ShapeDtypeStruct(shape, leaf.dtype).size * leaf.dtype.itemsize
    return total


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings in mappings, by the parts of dotted paths."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *above, last = path.split(".")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree
