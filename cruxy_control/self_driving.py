"""Self-driving: a rate that is found on the way, from how gradient and momentum agree."""

import dataclasses
from typing import Any, NamedTuple

from cruxy_control import filters
from cruxy_control.checks import check_bounds, check_range
from cruxy_control.controls import Controls
from cruxy_control.signals import Signals
from cruxy_control.stability_v2 import SensorState, V2Sensors

RELATIVE_FLOOR = 0.01
"""A tensor's size counts as at least this where its rate is limited: zeros could never move."""


class SelfDrivingState(NamedTuple):
    """What `SelfDriving` remembers.

    Attributes:
        sensors: the filters behind clipping and telemetry.
        alignment: the smoothed alignment.
        step: good steps so far; int32, `()`.
        scale: the factor on the learning rate; float32, `()`.
    """

    sensors: SensorState
    alignment: filters.Ema
    step: Any
    scale: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfDriving(V2Sensors):
    """Steers the learning rate so that the gradient disagrees a little with the momentum.

    The sensor is the alignment `a`, the cosine between this step's gradient and the momentum before
    it. While steps are too small the gradient still points where the momentum does and `a` is
    positive; where they overshoot it points back. On a quadratic in its stationary state
    `E<g_t, m_{t-1}> = -(rate h / 2) E|m|^2` holds for any noise and any decay of the momentum, with
    `h` the curvature along the momentum: a negative alignment is the rate in units of what the
    curvature allows. Each step

        scale <- scale * limit_scale * exp(gain_t clip(a_bar - set_point, -1, 1)),
        gain_t = gain / (1 + t / gain_time)

    with `a_bar` the bias-corrected average of `a`. A gain that falls as `1 / t` never ends: it
    lets the rate move by the same factor in every doubling of the steps. `limit_scale`, what the
    relative limit on the rate (`relative_limit`) left of it in the step before, keeps the integral
    from winding up: a rate above what the parameters as a whole may follow is taken back at once.

    Clipping, guard and telemetry are those of `Meta3`; the decay rates stay as they are set.

    Attributes:
        alignment_decay: of the average `a_bar`.
        set_point: the alignment that is steered to, in `(-1, 1)`.
        gain: the largest change of the logarithm of the rate in the first step.
        gain_time: steps after which the gain is half of that.
        scale_bounds: bounds of the factor on the rate.

    Example:
        >>> import numpy as np
        >>> from cruxy_control import SelfDriving, Signals
        >>> law, one = SelfDriving(), np.float32(1.0)
        >>> state = law.init(np.float32(0.0), xp=np)
        >>> for alignment in (np.nan, 0.8, 0.8):  # before the first step there is no momentum
        ...     signals = Signals(one, one, one, np.float32(alignment), one)
        ...     state, controls = law.step(state, signals, xp=np)
        ...     print(f"{controls.meta_scale:.2f}")
        1.00
        2.48
        5.92
    """

    beta1_gain: float = 0.0
    alignment_decay: float = 0.9
    set_point: float = -0.25
    gain: float = 1.0
    gain_time: float = 20.0
    scale_bounds: tuple[float, float] = (1e-9, 1e9)

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "use 0.9"
        decay = self.alignment_decay
        check_range("alignment_decay", decay, 0.0, 1.0, upper_open=True, remedy=remedy)
        remedy = "use -0.25"
        ends = {"lower_open": True, "upper_open": True}
        check_range("set_point", self.set_point, -1.0, 1.0, **ends, remedy=remedy)
        check_range("gain", self.gain, 0.0, remedy="0 holds the rate")
        check_range("gain_time", self.gain_time, 0.0, lower_open=True, remedy="use 20")
        remedy = "use (1e-9, 1e9)"
        check_bounds("scale_bounds", self.scale_bounds, 0.0, 1e30, around=1.0, remedy=remedy)

    @property
    def needs_alignment(self) -> bool:
        """Whether `Signals.alignment` and `Signals.limit_scale` have to be measured."""
        return True

    def init(self, like: Any, *, xp: Any) -> SelfDrivingState:
        """The state before the first step, on the device of the 0-d array `like`."""
        zero = filters.zero(like, xp=xp)
        return SelfDrivingState(
            sensors=self.init_sensors(like, xp=xp),
            alignment=filters.Ema(zero, zero),
            step=filters.zero_count(like, xp=xp),
            scale=zero + 1.0,
        )

    def step(
        self, state: SelfDrivingState, signals: Signals, *, xp: Any
    ) -> tuple[SelfDrivingState, Controls]:
        """One step of the law: the new state, and the controls read from it."""
        ok = xp.isfinite(signals.grad_norm) & xp.isfinite(signals.gamma_norm)
        state = filters.select(ok, self._advance(state, signals, xp), state, xp=xp)
        controls = self.sensed_controls(state.sensors, signals, ok, xp=xp)
        return state, controls._replace(meta_scale=state.scale, alignment=state.alignment.value)

    def _advance(self, state: SelfDrivingState, signals: Signals, xp: Any) -> SelfDrivingState:
        known = xp.isfinite(signals.alignment)
        sensed = xp.where(known, signals.alignment, 0.0)
        alignment = filters.ema(state.alignment, sensed, self.alignment_decay, debias=True)
        alignment = filters.select(known, alignment, state.alignment, xp=xp)
        gain = self.gain * self.gain_time / (self.gain_time + state.step + 1.0)
        error = xp.clip(alignment.value - self.set_point, -1.0, 1.0)
        scale = state.scale * signals.limit_scale
        scale = scale * xp.where(known, xp.exp(gain * error), 1.0)
        return SelfDrivingState(
            sensors=self.sense(state.sensors, signals, xp=xp),
            alignment=alignment,
            step=state.step + 1,
            scale=xp.clip(scale, *self.scale_bounds),
        )


def relative_limit(mean_square: Any, limit: Any, floor: Any, *, xp: Any, whole: Any = None) -> Any:
    """The largest rate for a tensor: `limit * max(min(rms(theta), rms(whole)), floor)`.

    The directions of Adam and Lion have size 1 or less, so that no step moves a tensor by more than
    this share of its own size. The same scale is Adafactor's relative step (Shazeer and Stern 2018,
    arXiv:1804.04235, section 8), there as a factor, here as a bound. `whole` makes it a bound on
    one rate for all tensors too: without it the largest tensors, which are the scales of
    normalizations, let the rate wind up far above what the matrices follow, and the matrices stay
    at their limits for as long as it takes to come back.

    Args:
        mean_square: of the tensor; float32.
        limit: above 0.
        floor: size below which a tensor counts as this large, above 0, such as `RELATIVE_FLOOR`.
        xp: the array namespace.
        whole: the mean square of all parameters together, which bounds that of the tensor where it
            is a number; `None` for no bound.
    """
    square = mean_square if whole is None else xp.fmin(mean_square, whole)
    return limit * xp.clip(xp.sqrt(square), floor, float("inf"))


def alignment(along: Any, grad_norm: Any, moment_square: Any, *, xp: Any) -> Any:
    """The cosine between gradient and first moment; NaN where one of them is zero.

    Args:
        along: `sum g m` over all elements.
        grad_norm: the root of `sum g^2`.
        moment_square: `sum m^2`.
        xp: the array namespace.
    """
    # Roots before the product, whose square could overflow.
    return xp.clip(along / (grad_norm * xp.sqrt(moment_square)), -1.0, 1.0)


def limit_scale(largest: Any, rate: Any, *, xp: Any) -> Any:
    """The share that a limit leaves of a rate, or of the size of an update; 1 of 0.

    Args:
        largest: that is allowed, as `relative_limit` gives it; for the law's back-calculation the
            largest of all tensors.
        rate: what it bounds.
        xp: the array namespace.
    """
    return xp.where(rate > 0.0, xp.minimum(largest, rate) / rate, 1.0)


def averaging_weight(count: Any, power: Any, *, xp: Any) -> Any:
    """`(power + 1) / (t + power)`, `t = count + 1`: the weight of step `t` in the average.

    At 0 all iterates weigh the same; a larger `power` forgets the early ones: about the last
    `1 / (power + 1)` of the run counts, however long it is.

    Args:
        count: iterates before this one; int32 or float32.
        power: at least 0.
        xp: the array namespace.

    References:
        Shamir and Zhang, [Stochastic Gradient Descent for Non-smooth
        Optimization](https://arxiv.org/abs/1212.1824), 2013, section 4.
    """
    return (power + 1.0) / (count + 1.0 + power)
