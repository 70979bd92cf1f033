"""What an entry of the comparison is, and the optimizers that people use in JAX.

All decay weights by 0.1 and, where they can be told to, of matrices alone; what does not count its
decay in units of the rate says so. Nothing else is tuned: the rate is the one knob, and every
optimizer gets the same number of trials of it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks._rates import RATES, WEIGHT_DECAY, scaled
from cruxy_optax import average_iterates, averaged_params

SOURCES = ("benchmarks/_jax/optimizers.py", "benchmarks/_rates.py")


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
        default: the rate that it comes with; where optax gives it none, PyTorch's for Adam and a
            tenth of that for Lion.
        sources: patterns, from the repository's root, of the files that define it.
    """

    label: str
    make: Callable[[Any, int], optax.GradientTransformation]
    scale: float = 1.0
    averaged: Callable[[Any, Any], Any] = _current
    skipped: Callable[[Any], Any] = _no_guard
    grid: tuple[float, ...] = RATES
    default: float = 1e-3
    sources: tuple[str, ...] = SOURCES

    def rates(self) -> tuple[float, ...]:
        """Its grid."""
        return scaled(self.grid, self.scale)


def matrices(params: Any) -> Any:
    """Weight decay is for matrices; gains and biases are left alone."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def warm_up_cosine(rate: Any, steps: int) -> optax.Schedule:
    """Linear warm-up over a tenth of the run, then a cosine to zero."""
    shape = optax.schedules.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)
    return lambda count: rate * shape(count)


def cosine(rate: Any, steps: int) -> optax.Schedule:
    """A cosine to zero, for those whose rate warms up by itself while it is looked for."""
    shape = optax.schedules.cosine_decay_schedule(1.0, steps)
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


def _prodigy(rate: Any, steps: int) -> optax.GradientTransformation:
    return optax.contrib.prodigy(rate, weight_decay=WEIGHT_DECAY)


def _d_adaptation(rate: Any, steps: int) -> optax.GradientTransformation:
    return optax.contrib.dadapt_adamw(rate, weight_decay=WEIGHT_DECAY)


def _mechanic(rate: Any, steps: int) -> optax.GradientTransformation:
    return optax.contrib.mechanize(_adamw(rate, steps))


def _dog(rate: Any, steps: int) -> optax.GradientTransformation:
    # Its authors average like this. It does not decay: optax's decay is a penalty, whose gradient
    # its rate would count.
    return optax.chain(optax.contrib.dog(rate), average_iterates(8.0))


def _schedule_free_plus(rate: Any, steps: int) -> optax.GradientTransformation:
    """ScheduleFree+, which optax does not have, from the equations of its author.

    Schedule-Free averaging of an Adam whose steps have Polyak's length for a lowest loss of 0. The
    inner product in the numerator carries the loss from the point of the gradient to the iterate,
    `beta (z - x) = z - y`; the decay goes with the square of the length, and so do the weights of
    the average, with the square of the largest so far.

    References:
        Defazio, [ScheduleFree+](https://arxiv.org/abs/2605.19095), 2026, and
        `AdamCScheduleFreePlusPaper` in https://github.com/facebookresearch/schedule_free, with its
        defaults but for the decay, which is within the range that the paper gives, 5 to 50.
    """
    decay, beta, adam = 10.0, 0.9, optax.scale_by_adam(0.9, 0.95)

    def init(params: Any) -> optax.contrib.ScheduleFreeState:
        zero, z = jnp.zeros((), jnp.float32), jax.tree.map(jnp.copy, params)
        one = jnp.ones((), jnp.int32)
        return optax.contrib.ScheduleFreeState(
            jnp.float32(beta), zero, one, zero, adam.init(params), z
        )

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        ahead = optax.tree.vdot(updates, jax.tree.map(lambda z, y: z - y, state.z, params))
        size = optax.tree.norm(updates, ord=1) * math.sqrt(math.pi / 2)
        length = jnp.where(size > 0.0, rate * jnp.maximum(extra["value"] + ahead, 0.0) / size, 0.0)
        direction, inner = adam.update(updates, state.base_optimizer_state)
        z = jax.tree.map(
            lambda z, u, y, m: z - length * u - decay * length**2 * m * y,
            *(state.z, direction, params, matrices(params)),
        )
        largest = jnp.maximum(state.max_lr, length)
        total = state.weight_sum + largest**2
        share = jnp.where(total > 0.0, largest**2 / total, 0.0)
        x = optax.contrib.schedule_free_eval_params(state, params)
        x = jax.tree.map(lambda x, z: x + share * (z - x), x, z)
        moved = jax.tree.map(lambda x, z, y: beta * x + (1.0 - beta) * z - y, x, z, params)
        count = optax.safe_increment(state.step_count)
        return moved, state._replace(
            weight_sum=total, step_count=count, max_lr=largest, base_optimizer_state=inner, z=z
        )

    return optax.GradientTransformationExtraArgs(init, update)


class _EmoSensState(NamedTuple):
    mu: Any
    nu: Any
    short: jax.Array  # the loss over about 3 steps; NaN before the first
    long: jax.Array  # over about 100
    noise: jax.Array
    signal: jax.Array
    ratio: jax.Array


def _emosens(rate: Any, steps: int) -> optax.GradientTransformation:
    """EmoSens 3.7.6, which no package offers, from the formulas of its author; newer ones exist.

    Adam without debiasing, whose rate follows how the averages of the loss differ and never leaves
    1e-6 to 3e-3. Its choice between averages over 20 and over 100 steps compares products that are
    equal but for rounding; here it is always the latter.

    References:
        muooon, [EmoSens](https://github.com/muooon/EmoSens), 2026, with its defaults
        but for the decay.
    """
    tree = optax.tree

    def init(params: Any) -> _EmoSensState:
        zeros, nan = tree.zeros_like(params), jnp.full((), jnp.nan, jnp.float32)
        start = jnp.array([1.0, 0.02, 1.0], jnp.float32)
        return _EmoSensState(zeros, zeros, nan, nan, *start)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        loss = extra["value"]
        before = [jnp.where(jnp.isnan(x), loss, x) for x in (state.short, state.long)]
        short, long = (x + w * (loss - x) for x, w in zip(before, (0.3, 0.01), strict=True))
        scalar = jnp.tanh((long - short) / jnp.maximum(long, 1e-5))
        trust = jnp.copysign(1.0 - jnp.abs(scalar), scalar)
        noise = 0.97 * state.noise + 0.03 * jnp.abs(scalar)
        signal = 0.97 * state.signal + 0.03 * jnp.abs(trust)
        now = ((jnp.abs(noise - signal) + 0.1) / (jnp.abs(scalar - trust) + 0.1)) ** 2
        ratio = jnp.where(jnp.abs(trust) <= 0.5, 0.98 * now, state.ratio)
        faster = (now >= state.ratio) & (trust >= 0.5)
        ratio = jnp.where(faster, jnp.minimum(now, 1.05 * state.ratio), ratio)
        found = jnp.clip(1e-4 * rate * ratio, 1e-6, 3e-3)
        mu = tree.update_moment(updates, state.mu, 0.9, 1)
        nu = tree.update_moment_per_elem_norm(updates, state.nu, 0.995, 2)
        decayed = jax.tree.map(lambda p, m: WEIGHT_DECAY * m * p, params, matrices(params))
        step = jax.tree.map(
            lambda m, v, d: -found * (m / (jnp.sqrt(v) + 1e-8) + d), mu, nu, decayed
        )
        return step, _EmoSensState(mu, nu, short, long, noise, signal, ratio)

    return optax.GradientTransformationExtraArgs(init, update)


def _clipped(rate: Any, steps: int) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), _adamw(rate, steps))


PEERS = {
    "adamw": Optimizer("AdamW, constant", _adamw),
    "adamw-cosine": Optimizer("AdamW, warm-up and cosine", _scheduled(_adamw, warm_up_cosine)),
    "adamw-wsd": Optimizer("AdamW, warm-up-stable-decay", _scheduled(_adamw, warm_up_stable_decay)),
    "lion": Optimizer("Lion, constant", _lion, scale=0.1, default=1e-4),
    "lion-cosine": Optimizer(
        "Lion, warm-up and cosine", _scheduled(_lion, warm_up_cosine), 0.1, default=1e-4
    ),
    "schedule-free": Optimizer(
        "Schedule-Free AdamW",
        lambda rate, steps: optax.contrib.schedule_free_adamw(rate, weight_decay=WEIGHT_DECAY),
        averaged=optax.contrib.schedule_free_eval_params,
        default=2.5e-3,
    ),
    "schedule-free-plus": Optimizer(
        "ScheduleFree+",
        _schedule_free_plus,
        scale=100.0,
        averaged=optax.contrib.schedule_free_eval_params,
        default=1.0,
    ),
    "emosens": Optimizer("EmoSens 3.7.6", _emosens, scale=100.0, default=1.0),
    "prodigy": Optimizer("Prodigy", _prodigy, scale=100.0, default=1.0),
    "prodigy-cosine": Optimizer(
        "Prodigy, cosine", _scheduled(_prodigy, cosine), scale=100.0, default=1.0
    ),
    "d-adaptation": Optimizer("D-Adaptation AdamW", _d_adaptation, scale=100.0, default=1.0),
    "d-adaptation-cosine": Optimizer(
        "D-Adaptation AdamW, cosine", _scheduled(_d_adaptation, cosine), scale=100.0, default=1.0
    ),
    "mechanic": Optimizer("Mechanic with AdamW", _mechanic, scale=100.0, default=1.0),
    "mechanic-cosine": Optimizer(
        "Mechanic with AdamW, cosine", _scheduled(_mechanic, cosine), scale=100.0, default=1.0
    ),
    "momo": Optimizer(
        "MoMo-Adam",
        lambda rate, steps: optax.contrib.momo_adam(rate, weight_decay=WEIGHT_DECAY),
        default=1e-2,
    ),
    "muon": Optimizer("Muon, constant", _muon),
    "muon-cosine": Optimizer("Muon, warm-up and cosine", _scheduled(_muon, warm_up_cosine)),
    "dog": Optimizer(
        "DoG",
        _dog,
        scale=100.0,
        averaged=averaged_params,
        default=1.0,
        sources=(
            *SOURCES,
            "cruxy_optax/_actuators/average.py",
            "cruxy_control/formulas/averaging.py",
        ),
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
