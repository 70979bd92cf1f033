"""What an entry of the comparison is, and the optimizers that people use in JAX.

All decay weights by 0.1 and, where they can be told to, of matrices alone. Nothing else is tuned:
the rate is the one knob, and every optimizer gets the same number of trials of it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
        default: the rate that it comes with; PyTorch's where optax gives it none.
        sources: patterns, from the repository's root, of the files that define it.
    """

    label: str
    make: Callable[[Any, int], optax.GradientTransformation]
    scale: float = 1.0
    averaged: Callable[[Any, Any], Any] = _current
    skipped: Callable[[Any], Any] = _no_guard
    grid: tuple[float, ...] = RATES
    default: float = 1e-3
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


def _prodigy(rate: Any, steps: int) -> optax.GradientTransformation:
    return optax.contrib.prodigy(rate, weight_decay=WEIGHT_DECAY)


def _scheduled_prodigy(rate: Any, steps: int) -> optax.GradientTransformation:
    schedule = warm_up_cosine(rate, steps)
    return optax.contrib.prodigy(schedule, weight_decay=WEIGHT_DECAY, safeguard_warmup=True)


def _schedule_free_plus(rate: Any, steps: int) -> optax.GradientTransformation:
    """ScheduleFree+, which no package offers yet, from the equations of its paper.

    Schedule-Free averaging of an Adam whose steps have Polyak's length for a lowest loss of 0, and
    whose decay goes with the square of that length. The inner product in the numerator carries the
    loss from the point of the gradient to the iterate: `beta (z - x) = z - y`.

    References:
        Defazio, [ScheduleFree+](https://arxiv.org/abs/2605.19095), 2026, algorithm 1, with the
        defaults of its author and a decay within the range that he gives, 5 to 50.
    """
    decay, adam = 10.0, optax.scale_by_adam(0.9, 0.95)

    def polyak(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        ahead = optax.tree.vdot(updates, jax.tree.map(lambda z, y: z - y, extra["z"], params))
        size = optax.tree.norm(updates, ord=1) * math.sqrt(math.pi / 2)
        length = rate * jnp.maximum(extra["value"] + ahead, 0.0) / size
        direction, state = adam.update(updates, state)
        decayed = jax.tree.map(lambda y, m: decay * m * y, params, matrices(params))
        step = jax.tree.map(lambda u, y: -length * u - length**2 * y, direction, decayed)
        return step, state

    base = optax.GradientTransformationExtraArgs(adam.init, polyak)
    averaging = optax.contrib.schedule_free(base, learning_rate=1.0)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return averaging.update(updates, state, params, z=state.z, **extra)

    return optax.GradientTransformationExtraArgs(averaging.init, update)


class _EmoSensState(NamedTuple):
    mu: Any
    nu: Any
    short: jax.Array  # the loss over about 3 steps; NaN before the first
    long: jax.Array  # over about 100
    noise: jax.Array
    signal: jax.Array
    ratio: jax.Array


def _emosens(rate: Any, steps: int) -> optax.GradientTransformation:
    """EmoSens 3.7.6, which no package offers, from the formulas of its author.

    Adam without debiasing, whose rate follows how the averages of the loss differ and never leaves
    1e-6 to 3e-3. Its choice between averages over 20 and over 100 steps compares products that are
    equal but for rounding; here it is always the latter.

    References:
        muooon, [EmoSens](https://github.com/muooon/EmoSens), 2026, with its defaults.
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
    "emosens": Optimizer("EmoSens", _emosens, scale=100.0, default=1.0),
    "prodigy": Optimizer("Prodigy", _prodigy, scale=100.0, default=1.0),
    "prodigy-cosine": Optimizer(
        "Prodigy, warm-up and cosine", _scheduled_prodigy, scale=100.0, default=1.0
    ),
    "d-adaptation": Optimizer(
        "D-Adaptation AdamW",
        lambda rate, steps: optax.contrib.dadapt_adamw(rate, weight_decay=WEIGHT_DECAY),
        scale=100.0,
        default=1.0,
    ),
    "mechanic": Optimizer(
        "Mechanic with AdamW",
        lambda rate, steps: optax.contrib.mechanize(_adamw(rate, steps)),
        scale=100.0,
        default=1.0,
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
        lambda rate, steps: optax.contrib.dog(rate, weight_decay=WEIGHT_DECAY, mask=matrices),
        scale=100.0,
        default=1.0,
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
