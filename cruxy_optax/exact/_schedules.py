"""Schedules with the same bits everywhere."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from cruxy_exact import optimizers as core
from cruxy_optax.exact._frame import frame


def warmup_cosine(
    peak: float, warmup: int, steps: int, end: float = 0.0
) -> Callable[[chex.Numeric], jax.Array]:
    """A schedule that rises in a line and falls along half a cosine, with the same bits everywhere.

    Args:
        peak: the highest rate.
        warmup: steps of the rise, from 0.
        steps: in all, at which the rate is `end` and stays; above `warmup`.
        end: the last rate.

    Returns:
        A function of the number of the step, from 0 and below `2^24`, to float32.

    Raises:
        ValueError: where `steps` is not above `warmup`; from the first call.
    """
    options = {"peak": peak, "warmup": warmup, "steps": steps, "end": end}
    return _schedule(core.warmup_cosine, options)


def warmup_stable_decay(
    peak: float, warmup: int, decay: int, steps: int, end: float = 0.0
) -> Callable[[chex.Numeric], jax.Array]:
    """A schedule that rises in a line, stays, and falls in a line over the last `decay` steps.

    Args:
        peak: the highest rate.
        warmup: steps of the rise, from 0.
        decay: steps of the fall, at least 1.
        steps: in all.
        end: the last rate.

    Returns:
        A function of the number of the step, from 0 and below `2^24`, to float32.

    Raises:
        ValueError: where `warmup` and `decay` do not fit into `steps`; from the first call.
    """
    options = {"peak": peak, "warmup": warmup, "decay": decay, "steps": steps, "end": end}
    return _schedule(core.warmup_stable_decay, options)


def _schedule(formula: Any, options: dict[str, Any]) -> Callable[[chex.Numeric], jax.Array]:
    def rate(count: chex.Numeric) -> jax.Array:
        with frame():
            return formula(jnp.asarray(count, jnp.int32), **options, xp=jnp)

    return rate
