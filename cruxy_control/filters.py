"""The filters behind every law: bias-corrected averages, short memories, and the loss slope.

Plain functions over small NamedTuples of scalars. Each takes the array namespace as `xp` (`numpy`,
`jax.numpy` or `torch`) and never branches on a value.
"""

from typing import Any, NamedTuple

from cruxy_control.signals import known

EPS = 1e-8
"""Added to every denominator but that of `z` (WP 4, 6)."""


def zero(like: Any, *, xp: Any) -> Any:
    """A float32 zero on the device of the 0-d array `like`."""
    return xp.zeros_like(like, dtype=xp.float32)


def zero_count(like: Any, *, xp: Any) -> Any:
    """An int32 zero on the device of the 0-d array `like`."""
    return xp.zeros_like(like, dtype=xp.int32)


MAX_COUNT = 2**31 - 1
"""The largest int32, at which counters stay."""


def next_count(count: Any, *, xp: Any) -> Any:
    """One more than an int32 counter, which stays at the largest one: it would go on below 0."""
    return xp.clip(count, 0, MAX_COUNT - 1) + 1


def select(ok: Any, new: Any, old: Any, *, xp: Any) -> Any:
    """`new` where `ok`, else `old`, through every field of a nested NamedTuple."""
    if isinstance(old, tuple):
        return type(old)(*(select(ok, n, o, xp=xp) for n, o in zip(new, old, strict=True)))
    return xp.where(ok, new, old)


def reset(over: Any, value: float, old: Any, *, xp: Any) -> Any:
    """The number `value` where `over`, else `old`, through every field of a nested NamedTuple."""
    if isinstance(old, tuple):
        return type(old)(*(reset(over, value, field, xp=xp) for field in old))
    return xp.where(over, value, old)


class Ema(NamedTuple):
    """An exponential moving average.

    Attributes:
        value: the average; float32, `()`.
        weight: the share of it that observations fill, from 0 to 1; float32, `()`.
    """

    value: Any
    weight: Any


def ema(state: Ema, x: Any, decay: float, *, debias: bool) -> Ema:
    """One step of the average (WP 2, 3, 5), corrected for its start at zero if `debias`.

    With `w <- a w + (1 - a)` the step is `v <- v + ((1 - a) / w) (x - v)`: the first observation
    is the first value, and the average of a constant is that constant at once. Dividing
    `value` by `1 - a^t` gives the same as long as nobody touches the value in between; the history
    correction does, and then only this form stays right. Without `debias` `w` is taken as 1,
    which is the plain average from zero.
    """
    weight = decay * state.weight + (1.0 - decay)
    gain = (1.0 - decay) / weight if debias else 1.0 - decay
    return Ema(state.value + gain * (x - state.value), weight)


# A ring is a float32 vector, newest entry first.

UNFILLED = -1.0
"""An entry not yet filled: norms are never negative, so the marker needs no counter beside it."""


def empty_ring(length: int, like: Any, *, xp: Any) -> Any:
    """A ring of `length` entries, none of them filled; float32, `(length,)`."""
    return xp.stack([zero(like, xp=xp) + UNFILLED] * length)


def push(ring: Any, x: Any, *, xp: Any) -> Any:
    """The ring with `x` as its newest entry and the oldest gone."""
    first = xp.arange(len(ring)) == 0
    return xp.where(first, x, xp.roll(ring, 1))


def ring_mean(ring: Any, *, xp: Any) -> Any:
    """The mean of the filled entries (WP 8); 0 of an empty ring."""
    return _weighted_mean(ring, xp.ones_like(ring), xp)


def history_mean(ring: Any, memory: float, *, xp: Any) -> Any:
    """The mean of the filled entries with weights `exp(-k / memory)`, `k` the age (v2.0 31, 32)."""
    age = xp.arange(len(ring), dtype=xp.float32)
    return _weighted_mean(ring, xp.exp(-age / memory), xp)


def _weighted_mean(ring: Any, weights: Any, xp: Any) -> Any:
    weights = xp.where(ring >= 0.0, weights, 0.0)
    total = xp.sum(weights)
    # Shares, so that norms near the largest float do not overflow in the sum.
    return xp.sum(weights / xp.where(total > 0.0, total, 1.0) * ring)


class Windows(NamedTuple):
    """The fast and the slow average of `sigma`.

    Attributes:
        fast: `v_fast` (WP 2).
        slow: `v_slow` (WP 3).
    """

    fast: Ema
    slow: Ema


def empty_windows(like: Any, *, xp: Any) -> Windows:
    """Both averages before the first observation."""
    nothing = Ema(zero(like, xp=xp), zero(like, xp=xp))
    return Windows(nothing, nothing)


def windows(
    state: Windows,
    sigma: Any,
    *,
    fast_decay: float,
    slow_decay: float,
    debias: bool,
    outlier_cap: float | None,
    xp: Any,
) -> Windows:
    """Both averages after one more observation.

    From the second observation on they see `min(sigma, outlier_cap * v_slow)`, so that one outlier
    cannot steer for hundreds of steps. A bias-corrected `v_slow` is a plain mean at the start and
    follows a true rise within a few steps, so the cap needs no warm-up; with one of ten steps, an
    outlier of 1000 at the third step still left the rate 56 % high nine hundred steps later. Where
    `v_slow` is 0 there is nothing to compare with, and a model that thaws after all-zero gradients
    is seen as it is.
    """
    if outlier_cap is not None:
        limited = xp.minimum(sigma, outlier_cap * state.slow.value)
        sigma = xp.where(state.slow.value > 0.0, limited, sigma)
    return Windows(
        fast=ema(state.fast, sigma, fast_decay, debias=debias),
        slow=ema(state.slow, sigma, slow_decay, debias=debias),
    )


def misled(state: Windows, sigma: Any, *, slow_decay: float, outlier_cap: float | None) -> Any:
    """Whether what started the averages was an outlier, so that they should start over.

    The first observation cannot be judged when it comes. If one of the next nine is more than
    `outlier_cap` times below the mean so far, that mean was it: kept, a first norm 1000 times too
    large left the rate of `Meta3` two thirds high for a thousand steps.
    """
    young = state.slow.weight < 1.0 - slow_decay**10
    if outlier_cap is None:
        return young & (sigma < 0.0)
    return young & (sigma > 0.0) & (outlier_cap * sigma < state.slow.value)


def ratio(fast: Any, slow: Any) -> Any:
    """`v_fast / (v_slow + eps)` (v2.0 24, 40)."""
    return fast / (slow + EPS)


def phase(fast: Any, slow: Any) -> Any:
    """`phi = v_fast / (v_fast + v_slow + eps)` (WP 6): 0.5 on a steady gradient."""
    return fast / (fast + slow + EPS)


class Curvature(NamedTuple):
    """The smoothed slope of the loss along the path, and the pair it compares with.

    Attributes:
        value: `c_bar`; float32, `()`; 0 means "no evidence".
        loss: the last finite loss.
        grad_norm: the gradient norm of the same step.
        pairs: whether that pair exists, 0 or 1; int32, `()`.
    """

    value: Any
    loss: Any
    grad_norm: Any
    pairs: Any


def empty_curvature(like: Any, *, xp: Any) -> Curvature:
    """No evidence and nothing to compare with."""
    nothing = zero(like, xp=xp)
    return Curvature(nothing, nothing, nothing, zero_count(like, xp=xp))


def curvature(
    state: Curvature,
    loss: Any,
    grad_norm: Any,
    *,
    decay: float,
    limit: float | None,
    hold_missing: bool,
    xp: Any,
) -> Curvature:
    """`c = (L_t - L_{t-1}) / (|g_{t-1}| + eps)` (WP 4), smoothed (WP 5).

    The average starts at 0 and is not bias-corrected: 0 says "no evidence". A missing or
    non-finite loss holds it and keeps the pair (loss, norm), which is only renewed together.

    Args:
        state: the last step's.
        loss: this step's loss, `NOT_KNOWN` or not finite where there is none.
        grad_norm: this step's gradient norm, finite.
        decay: of the average.
        limit: `c` is clipped to `[-limit, limit]`; `None` for no limit.
        hold_missing: false counts a missing loss as 0, as `cruxy` 2.1.0 does.
        xp: the array namespace.
    """
    sure = known(loss)
    loss = xp.where(sure, loss, state.loss if hold_missing else 0.0)
    if not hold_missing:
        sure = known(loss)
    slope = (loss - state.loss) / (state.grad_norm + EPS)
    if limit is not None:
        slope = xp.clip(slope, -limit, limit)
    comparable = sure & (state.pairs > 0) & xp.isfinite(slope)
    moved = state.value + (1.0 - decay) * (slope - state.value)
    return Curvature(
        value=xp.where(comparable, moved, state.value),
        loss=xp.where(sure, loss, state.loss),
        grad_norm=xp.where(sure, grad_norm, state.grad_norm),
        pairs=xp.where(sure, xp.ones_like(state.pairs), state.pairs),
    )
