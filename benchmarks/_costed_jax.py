"""The JAX optimizers whose costs are measured, and the step that trains a workload with one."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks._costed import Costed
from benchmarks._optimizers import RATES, WEIGHT_DECAY, matrices
from benchmarks._our_optimizers import CONTROLLED
from benchmarks._our_optimizers import OPTIMIZERS as TRAINED
from benchmarks.workloads import Workload
from cruxy_optax import meta3, meta_lion

PEERS = ("lion", "adamw-clipped", "schedule-free", "prodigy", "muon", "dog")

# Costs do not depend on rate and horizon; these are ordinary ones.
_RATE, _STEPS = RATES[1], 1000


def _trained(name: str) -> Costed:
    entry = TRAINED[name]
    label = entry.label.removesuffix(", constant").replace("clip_by_global_norm(1)", "clipped")
    make = functools.partial(entry.make, entry.scale * _RATE, _STEPS)
    return Costed(label, make, ours=name in CONTROLLED)


def _ours(label: str, make: Callable[..., Any], rate: float, **options: Any) -> Costed:
    common = {"weight_decay": WEIGHT_DECAY, "mask": matrices}
    return Costed(label, functools.partial(make, rate, **common, **options), ours=True)


COMPACT = {
    "meta_lion-bfloat16": _ours(
        "Meta-Lion, bfloat16", meta_lion, 0.1 * _RATE, mu_dtype=jnp.bfloat16
    ),
    "meta3-8bit": _ours("Meta3, 8 bits", meta3, _RATE, state_bits=8),
    "meta3-4bit": _ours("Meta3, 4 bits", meta3, _RATE, state_bits=4),
    "meta_lion-8bit": _ours("Meta-Lion, 8 bits", meta_lion, 0.1 * _RATE, state_bits=8),
    "meta_lion-4bit": _ours("Meta-Lion, 4 bits", meta_lion, 0.1 * _RATE, state_bits=4),
}
"""Ours with a smaller state."""

OPTIMIZERS: dict[str, Costed] = (
    {name: _trained(name) for name in ("adamw", *CONTROLLED)}
    | COMPACT
    | {name: _trained(name) for name in PEERS}
)
"""Every optimizer by name; `adamw` is what the others are compared with."""

Step = Callable[..., tuple[Any, Any]]
"""Parameters, state and more to new parameters and new state."""


def training_step(tx: optax.GradientTransformation, workload: Workload) -> Step:
    """One step of training, from parameters, state and a batch; not jitted."""
    tx = optax.with_extra_args_support(tx)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        loss, grads = jax.value_and_grad(workload.loss)(params, batch)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    return step
