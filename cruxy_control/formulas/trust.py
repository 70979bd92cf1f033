"""The formulas that fit a step to the size of what it moves: trust ratios and adaptive clips."""

from typing import Any

from cruxy_control.formulas.limits import limit_scale
from cruxy_control.signals import root

TRUST_CAP = 10.0
"""The largest trust ratio."""

TRUST_FLOOR = 1e-3
"""A tensor's root mean square counts as at least this: zeros, as in LoRA's B, could never move."""

ANY_RATIO = 1e30
"""A cap that no ratio of sizes reaches."""

RMS_BLOCK = 256
"""Elements of a block along the last axis, for a limit of each; what is left over is one too."""

AGC_EPS = 1e-3
"""A parameter's norm counts as at least this where a gradient is clipped by it (Brock et al.)."""

BALANCE_EVERY = 25
"""Good steps between two corrections of the rates of slices (Tiger)."""

BALANCE_CLIP = 0.1
"""How far from 1 a correction is at most. A choice of this package."""

BALANCE_BOUNDS = (0.7, 1.3)
"""What the rate of a slice is multiplied by at least and at most (Tiger)."""

_BALANCE_SIZE, _BALANCE_TRUST = 0.7, 0.3
"""What the two objectives weigh (Tiger)."""

_SMALLEST_RATIO = 1e-30
"""Whose logarithm stands for that of a ratio of 0, which an infinite direction has."""


def trust_ratio(param_rms: Any, update_rms: Any, cap: Any, floor: Any, *, xp: Any) -> Any:
    """`min(cap, max(|p|, floor sqrt(n)) / |u|)`, and 1 where `u` is 0.

    Written in root mean squares, in which the number `n` of elements cancels:
    `min(cap, max(rms(p), floor) / rms(u))`. Norms of a tensor and of its direction, of a row or of
    a slice and of the same part of the direction.

    Args:
        param_rms: root mean square of the parameter; any shape.
        update_rms: that of the direction; of the same shape.
        cap: the largest ratio, above 0.
        floor: the smallest root mean square that a parameter counts with, above 0.
        xp: the array namespace.

    References:
        You et al., [LAMB](https://arxiv.org/abs/1904.00962), 2019, algorithm 2; there without cap
        and floor.
    """
    size = xp.clip(param_rms, floor, float("inf"))
    some = update_rms > 0.0
    below = size < cap * update_rms
    # No division by what is so small that its quotient, or the derivative of that, is infinite.
    ratio = xp.where(below, size / xp.where(below, update_rms, 1.0), cap)
    return xp.where(some, ratio, 1.0)


def log_average(average: Any, ratio: Any, decay: Any, *, xp: Any) -> Any:
    """`decay * a + (1 - decay) ln(r)`: the average of ratios in log space.

    Args:
        average: `a` before this step, 0 at first; any shape.
        ratio: `r` of this step; of the same shape.
        decay: in `[0, 1)`.
        xp: the array namespace.
    """
    return decay * average + (1.0 - decay) * xp.log(xp.clip(ratio, _SMALLEST_RATIO, float("inf")))


def averaged_ratio(average: Any, decays: Any, *, xp: Any) -> Any:
    """`exp(a / (1 - decay^t))`: the geometric mean of the ratios so far, the late ones heavier.

    Args:
        average: of `log_average`, after at least one step.
        decays: `decay^t`, the product of all decays so far.
        xp: the array namespace.
    """
    return xp.exp(average / (1.0 - decays))


def agc_scale(grad_norm: Any, param_norm: Any, clip: Any, eps: Any = AGC_EPS, *, xp: Any) -> Any:
    """`min(1, clip max(|p|, eps) / |g|)`: the factor of adaptive gradient clipping.

    On the gradient, never on a direction, whose size says nothing of how good a step is.

    Args:
        grad_norm: Euclidean norm of the gradient, of a tensor or of each row; any shape.
        param_norm: that of the parameter; of the same shape.
        clip: the largest share of the parameter's norm that a gradient has, above 0.
        eps: the smallest norm that a parameter counts with, above 0.
        xp: the array namespace.

    References:
        Brock et al., [High-Performance Large-Scale Image Recognition Without
        Normalization](https://arxiv.org/abs/2102.06171), 2021, equation 3.
    """
    return limit_scale(clip * xp.clip(param_norm, eps, float("inf")), grad_norm, xp=xp)


def rms_clip_scale(rms: Any, limit: Any, *, xp: Any) -> Any:
    """`min(1, limit / rms)`, and 1 where `rms` is 0.

    Args:
        rms: root mean square of a direction: of a tensor, or of each row or block; any shape.
        limit: the largest, above 0.
        xp: the array namespace.

    References:
        Shazeer and Stern, [Adafactor](https://arxiv.org/abs/1804.04235), 2018, section 6.
    """
    return limit_scale(xp.ones_like(rms) * limit, rms, xp=xp)


def balance_slices(
    multipliers: Any, update_rms: Any, trust: Any, clip: Any, bounds: Any, *, xp: Any
) -> tuple[Any, Any]:
    """One correction of the rates of a tensor's slices, towards the median of them.

    Two things are to be alike in all slices: how large the step is, and how large it is for the
    size of the parameter. With `r` the root mean square of each slice's step, its multiplier
    included, and `T` its trust ratio likewise, their dispersion is
    `D = sqrt(.7 ln^2(max r / min r) + .3 ln^2(max T / min T))` (Tiger's). A slice is multiplied by
    `exp(D / (1 + D) (.7 ln(med r / r) + .3 ln(T / med T)))`, at most `1 - clip` to `1 + clip`: the
    further apart slices are, the stronger the pull.

    Args:
        multipliers: of the slices of one tensor, 1 at first; shape `(slices,)`.
        update_rms: root mean square of each slice of the direction, without its multiplier.
        trust: `rms(p) / rms(u)` of each slice, without its multiplier; above 0.
        clip: in `(0, 1)`.
        bounds: the smallest and the largest multiplier, around 1.
        xp: the array namespace.

    Returns:
        The new multipliers, unchanged where a slice has no direction at all; and `D`, before the
        correction, 0 there.
    """
    some = update_rms.min() > 0.0
    size = xp.log(xp.where(some, update_rms * multipliers, 1.0))
    room = xp.log(xp.where(some, trust / multipliers, 1.0))
    apart = _BALANCE_SIZE * (size.max() - size.min()) ** 2
    apart = root(apart + _BALANCE_TRUST * (room.max() - room.min()) ** 2, xp=xp)
    pull = _BALANCE_SIZE * (xp.quantile(size, 0.5) - size)
    pull = pull + _BALANCE_TRUST * (room - xp.quantile(room, 0.5))
    factor = xp.clip(xp.exp(pull * apart / (1.0 + apart)), 1.0 - clip, 1.0 + clip)
    return xp.where(some, xp.clip(multipliers * factor, *bounds), multipliers), apart
