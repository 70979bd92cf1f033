"""How an optimizer of ours enters the comparison: what makes it, where it starts."""

from collections.abc import Callable
from typing import Any

import optax

from benchmarks._jax.optimizers import SOURCES as PEER_SOURCES
from benchmarks._jax.optimizers import Optimizer, matrices
from benchmarks._rates import STARTS, WEIGHT_DECAY
from cruxy_optax import averaged_params, telemetry

SOURCES = (
    *PEER_SOURCES,
    *(f"benchmarks/_jax/{name}.py" for name in ("entries", "our_optimizers", "rivals", "variants")),
    *("cruxy_control/**/*.py", "cruxy_exact/**/*.py", "cruxy_optax/**/*.py"),
)
"""What the figures of one depend on."""

FEW_STARTS = (1e-5, 1e-3, 1e-1)
"""Where those start that are compared with tuned optimizers alone."""


def skips(state: Any) -> Any:
    """Steps that the guard left out."""
    return telemetry(state)["skipped_total"]


def controlled(
    make: Callable[..., Any], label: str, scale: float = 1.0, **options: Any
) -> Optimizer:
    """One whose rate is given.

    Args:
        make: of a rate and options.
        label: in tables.
        scale: of its rates beside AdamW's.
        options: handed on.
    """

    def build(rate: Any, steps: int) -> optax.GradientTransformation:
        return make(rate, **{"weight_decay": WEIGHT_DECAY, "mask": matrices} | options)

    default = 1e-3 * scale
    return Optimizer(label, build, scale, skipped=skips, default=default, sources=SOURCES)


def driving(make: Callable[..., Any], label: str, **options: Any) -> Optimizer:
    """One that finds its rate; the grid is where it starts."""
    averages = options.get("averaging", 0) is not None
    entry = controlled(make, label, **options)._replace(grid=STARTS)
    return entry._replace(averaged=averaged_params) if averages else entry
