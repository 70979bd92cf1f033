"""The JAX optimizers whose costs are measured, and the step that trains a workload with one."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from benchmarks._jax.our_optimizers import COMPACT, CONTROLLED, SELF_DRIVING
from benchmarks._jax.our_optimizers import OPTIMIZERS as TRAINED
from benchmarks._measured_optimizers import MeasuredOptimizer
from benchmarks._rates import RATES
from benchmarks.workloads import Workload

OURS = (*CONTROLLED, *SELF_DRIVING, *COMPACT)
PEERS = ("lion", "adamw-clipped", "schedule-free", "prodigy", "muon", "dog")

# Costs do not depend on rate and horizon; these are ordinary ones.
_RATE, _STEPS = RATES[1], 1000


def _trained(name: str) -> MeasuredOptimizer:
    entry = TRAINED[name]
    label = entry.label.removesuffix(", constant").replace("clip_by_global_norm(1)", "clipped")
    make = functools.partial(entry.make, entry.scale * _RATE, _STEPS)
    return MeasuredOptimizer(label, make, ours=name in OURS)


OPTIMIZERS: dict[str, MeasuredOptimizer] = {
    name: _trained(name) for name in ("adamw", *OURS, *PEERS)
}
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
