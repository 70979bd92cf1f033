"""What a JAX optimizer's step sends between devices and holds, compiled for a mesh and not run."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import cruxy_optax
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


def measured(
    name: str, model: str, mesh: Mapping[str, int], *, stacked: bool, seconds: float
) -> dict[str, Any]:
    """What a step of an optimizer takes on each device, in a process of its own.

    Args:
        name: a key of `OPTIMIZERS`.
        model: a key of `MODELS`.
        mesh: sizes of the axes by name, in order.
        stacked: whether all layers are one tensor each.
        seconds: until it is given up.

    Raises:
        ValueError: where the step does not compile; the message is the compiler's.
    """
    devices = 1
    for size in mesh.values():
        devices *= size
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if "device_count" not in flag]
    here = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"]),
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }
    wanted = json.dumps([name, model, dict(mesh), stacked])
    done = subprocess.run(
        [sys.executable, "-m", __name__, wanted],
        env=os.environ | here,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()
        raise ValueError(f"{name} on {model} does not compile: {reason[-1] if reason else ''}")
    found = json.loads(done.stdout.splitlines()[-1])
    found["messages"] = [Message(**message) for message in found["messages"]]
    return found


def compiled(name: str, model: str, mesh: Mapping[str, int], *, stacked: bool) -> dict[str, Any]:
    """The same in this process, which has to have the devices."""
    sizes = tuple(mesh.values())
    explicit = jax.make_mesh(sizes, tuple(mesh), axis_types=(AxisType.Explicit,) * len(sizes))
    plain = jax.make_mesh(sizes, tuple(mesh), axis_types=(AxisType.Auto,) * len(sizes))
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

    def automatic(leaf: Any) -> Any:
        spec = leaf.sharding.spec if leaf.sharding is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(plain, PartitionSpec(*spec))
        )

    params, state = jax.tree.map(automatic, (params, state))
    places = jax.tree.map(lambda leaf: leaf.sharding, (params, state))

    def step(params: Any, state: Any, grads: Any, loss: jax.Array) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    loss = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(plain, PartitionSpec()))
    # Of the CPU, of all threads: a machine that others use too gives less of it in a second.
    times = [time.process_time()]
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


if __name__ == "__main__":
    _name, _model, _mesh, _stacked = json.loads(sys.argv[1])
    print(json.dumps(compiled(_name, _model, _mesh, stacked=_stacked)))
