"""What an entry of the comparison is, and the optimizers that people use in JAX.

All decay weights by 0.1 and, where they can be told to, of matrices alone. Nothing else is tuned:
the rate is the one knob, and every optimizer gets the same number of trials of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""The grid of Wortsman et al. (2023), for optimizers whose step is about the rate."""

STARTS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Where an optimizer starts to look that finds its rate itself: seven decades instead of three."""

WEIGHT_DECAY = 0.1


def _current(state: Any, params: Any) -> Any:
    return params


def _no_guard(state: Any) -> None:
    return None


class Optimizer(NamedTuple):
    """An optimizer to compare.

    Attributes:
        label: for tables and plots.
        make: from the rate and the number of steps, over which a schedule is laid.
        scale: of its grid of rates to `RATES`. A coordinate of a Lion step always has the size of
            the rate, of an Adam step seldom, so Lion's grid lies a decade lower; that of an
            optimizer which finds a rate itself lies around 1. All these grids span the same
            decades.
        averaged: optimizer state and parameters to the parameters to evaluate at.
        skipped: optimizer state to the number of steps a guard skipped.
        grid: the rates to try, before `scale`.
        sources: patterns, from the repository's root, of the files that define it.
    """

    label: str
    make: Callable[[Any, int], optax.GradientTransformation]
    scale: float = 1.0
    averaged: Callable[[Any, Any], Any] = _current
    skipped: Callable[[Any], Any] = _no_guard
    grid: tuple[float, ...] = RATES
    sources: tuple[str, ...] = ("benchmarks/_optimizers.py",)

    def rates(self) -> tuple[float, ...]:
        """Its grid."""
        return tuple(float(f"{self.scale * rate:.6g}") for rate in self.grid)


def matrices(params: Any) -> Any:
    """Weight decay is for matrices; gains and biases are left alone."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def warm_up_cosine(rate: Any, steps: int) -> optax.Schedule:
    """Linear warm-up over a tenth of the run, then a cosine to zero."""
    shape = optax.schedules.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)
    return lambda count: rate * shape(count)


def warm_up_stable_decay(rate: Any, steps: int) -> optax.Schedule:
    """Linear warm-up over a tenth, constant, and over the last fifth linearly to zero."""
    up, down = steps // 10, steps // 5
    parts = [
        optax.schedules.linear_schedule(0.0, 1.0, up),
        optax.schedules.constant_schedule(1.0),
        optax.schedules.linear_schedule(1.0, 0.0, down),
    ]
    shape = optax.schedules.join_schedules(parts, [up, steps - down])
    return lambda count: rate * shape(count)


def _adamw(rate: Any, steps: int) -> optax.GradientTransformation:
    return optax.adamw(rate, weight_decay=WEIGHT_DECAY, mask=matrices)


def _lion(rate: Any, steps: int) -> optax.GradientTransformation:
    return optax.lion(rate, weight_decay=WEIGHT_DECAY, mask=matrices)


def _muon(rate: Any, steps: int) -> optax.GradientTransformation:
    return optax.contrib.muon(
        rate, weight_decay=WEIGHT_DECAY, weight_decay_mask=matrices, adam_weight_decay=0.0
    )


def _scheduled(
    make: Callable[[Any, int], optax.GradientTransformation],
    schedule: Callable[[Any, int], optax.Schedule],
) -> Callable[[Any, int], optax.GradientTransformation]:
    return lambda rate, steps: make(schedule(rate, steps), steps)


def _clipped(rate: Any, steps: int) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), _adamw(rate, steps))


PEERS = {
    "adamw": Optimizer("AdamW, constant", _adamw),
    "adamw-cosine": Optimizer("AdamW, warm-up and cosine", _scheduled(_adamw, warm_up_cosine)),
    "adamw-wsd": Optimizer("AdamW, warm-up-stable-decay", _scheduled(_adamw, warm_up_stable_decay)),
    "lion": Optimizer("Lion, constant", _lion, scale=0.1),
    "lion-cosine": Optimizer("Lion, warm-up and cosine", _scheduled(_lion, warm_up_cosine), 0.1),
    "schedule-free": Optimizer(
        "Schedule-Free AdamW",
        lambda rate, steps: optax.contrib.schedule_free_adamw(rate, weight_decay=WEIGHT_DECAY),
        averaged=optax.contrib.schedule_free_eval_params,
    ),
    "prodigy": Optimizer(
        "Prodigy",
        lambda rate, steps: optax.contrib.prodigy(rate, weight_decay=WEIGHT_DECAY),
        scale=100.0,
    ),
    "muon": Optimizer("Muon, constant", _muon),
    "muon-cosine": Optimizer("Muon, warm-up and cosine", _scheduled(_muon, warm_up_cosine)),
    "dog": Optimizer(
        "DoG",
        lambda rate, steps: optax.contrib.dog(rate, weight_decay=WEIGHT_DECAY, mask=matrices),
        scale=100.0,
    ),
}
"""What people use."""

GUARDED_PEERS = {
    "adamw-if-finite": Optimizer(
        "AdamW in apply_if_finite",
        lambda rate, steps: optax.apply_if_finite(_adamw(rate, steps), max_consecutive_errors=5),
        skipped=lambda state: state.total_notfinite,
    ),
    "adamw-clipped": Optimizer("AdamW, clip_by_global_norm(1)", _clipped),
}
"""AdamW with what optax offers against bad batches."""
