"""What laws are built on: windows over the norm, its history, the loss slope, the early warning."""

import dataclasses
import math
from typing import Any, NamedTuple

from cruxy_control import filters
from cruxy_control.checks import check_bounds, check_count, check_range, make_plain
from cruxy_control.controls import Controls, clip_scale, neutral
from cruxy_control.signals import Signals, root

TREND_STEPS = 5
"""`v_fast` counts as a trend once it rose this many steps running (v2.0 41)."""

SENSED = (
    "meta_scale", "phase_scale", "clip_threshold", "clip_scale", "phase", "curvature", "warning",
)  # fmt: skip
"""The controls that a law on `V2Sensors` has something to say of, for its state's `telemetry`."""


class SensorState(NamedTuple):
    """What the sensors of `StabilityV2` and `Meta3` remember.

    Attributes:
        windows: the fast and slow average of `sigma`; the fast one history-corrected.
        history: the last values of `v_fast` before their correction; float32, `(history,)`.
        curvature: the loss slope.
        rising: steps running in which `v_fast` rose; int32, `()`.
    """

    windows: filters.Windows
    history: Any
    curvature: filters.Curvature
    rising: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class V2Sensors:
    """The sensing half of `StabilityV2`, which `Meta3` builds on.

    Attributes:
        gamma: exponent of the norm `sigma` (WP 1).
        fast_decay: decay of `v_fast` (WP 2).
        slow_decay: decay of `v_slow` (WP 3).
        curvature_decay: decay of `c_bar` (WP 5).
        history: length of the memory of `v_fast` (v2.0 31).
        history_memory: its time constant in steps (v2.0 32).
        history_correction: the part of the way `v_fast` moves to its weighted history
            (v2.0 33); 0 switches it off.
        beta1_gain: `beta1 = b1 (1 + beta1_gain tanh((c_bar - 0.01) / 0.05))` (v2.0 17); 0 leaves
            `b1` alone.
        beta1_offset: the 0.01 in it.
        beta1_temperature: the 0.05 in it.
        beta1_bounds: bounds of the result (v2.0 18).
        clip_threshold: `theta` of `theta (1 + clip_gain sqrt(v_fast / v_slow))` (v2.0 24);
            `None` for no clipping.
        clip_gain: see `clip_threshold`.
        surge_ratio: `v_fast / v_slow` above which a surge is counted (v2.0 40).
        surge_weight: what it adds to the warning.
        curvature_alarm: `|c_bar|` above which the curvature is counted (v2.0 42).
        curvature_weight: what it adds to the warning.
        trend_weight: what five rises of `v_fast` running add to the warning (v2.0 41).
        debias: bias-corrects both averages of `sigma`.
        outlier_cap: the averages see at most this multiple of `v_slow`; `None` for no cap.
        curvature_limit: each step's loss slope is clipped to plus or minus this before it is
            averaged; `None` for no limit.
        hold_missing_loss: a step without a finite loss holds the curvature; false counts it as a
            loss of 0.

    Raises:
        ValueError: where a constant is outside its range.
    """

    gamma: float = 1.5
    fast_decay: float = 0.9
    slow_decay: float = 0.999
    curvature_decay: float = 0.95
    history: int = 14
    history_memory: float = 5.0
    history_correction: float = 0.2
    beta1_gain: float = 0.15
    beta1_offset: float = 0.01
    beta1_temperature: float = 0.05
    beta1_bounds: tuple[float, float] = (0.85, 0.95)
    clip_threshold: float | None = 1.0
    clip_gain: float = 0.5
    surge_ratio: float = 2.5
    surge_weight: float = 0.5
    curvature_alarm: float = 0.1
    curvature_weight: float = 0.2
    trend_weight: float = 0.3
    debias: bool = True
    outlier_cap: float | None = 10.0
    curvature_limit: float | None = 1.0
    hold_missing_loss: bool = True

    def __post_init__(self) -> None:
        make_plain(self)
        check_windows(self)
        remedy = "1.5 is the paper's, 2 the Euclidean norm"
        check_range("gamma", self.gamma, 1.0, upper_open=True, remedy=remedy)
        remedy = "0.95 is the paper's"
        decay = self.curvature_decay
        check_range("curvature_decay", decay, 0.0, 1.0, upper_open=True, remedy=remedy)
        check_count("history", self.history, 1, remedy="use 14")
        for name in ("history_memory", "beta1_temperature"):
            check_range(name, getattr(self, name), 0.0, lower_open=True, remedy="keep the default")
        check_range("beta1_offset", self.beta1_offset, remedy="keep the default")
        remedy = "keep the default, or infinity for never"
        for name in ("surge_ratio", "curvature_alarm"):
            check_range(name, getattr(self, name), 0.0, math.inf, lower_open=True, remedy=remedy)
        remedy = "0 switches it off"
        check_range("history_correction", self.history_correction, 0.0, 1.0, remedy=remedy)
        check_range("beta1_gain", self.beta1_gain, 0.0, 1.0, upper_open=True, remedy=remedy)
        for name in ("clip_gain", "surge_weight", "curvature_weight", "trend_weight"):
            check_range(name, getattr(self, name), 0.0, remedy=remedy)
        check_bounds("beta1_bounds", self.beta1_bounds, 0.0, 1.0, remedy="use (0.85, 0.95)")
        if self.clip_threshold is not None:
            remedy = "use 1, or None for no clipping"
            check_range("clip_threshold", self.clip_threshold, 0.0, lower_open=True, remedy=remedy)
        if self.curvature_limit is not None:
            limit = self.curvature_limit
            remedy = "use 1, or None for no limit"
            check_range("curvature_limit", limit, 0.0, lower_open=True, remedy=remedy)

    def init_sensors(self, like: Any, *, xp: Any) -> SensorState:
        """The sensors before the first step, on the device of the 0-d array `like`."""
        return SensorState(
            windows=filters.empty_windows(like, xp=xp),
            history=filters.empty_ring(self.history, like, xp=xp),
            curvature=filters.empty_curvature(like, xp=xp),
            rising=filters.zero_count(like, xp=xp),
        )

    def sense(self, state: SensorState, signals: Signals, *, xp: Any) -> SensorState:
        """The sensors after one more good step (WP 1-5, v2.0 31-33, 41)."""
        over = misled(self, state.windows, signals.gamma_norm)
        before = filters.reset(over, 0.0, state.windows, xp=xp)
        history = filters.reset(over, filters.UNFILLED, state.history, xp=xp)
        rising = xp.where(over, 0, state.rising)
        windows = advance_windows(self, before, signals.gamma_norm, xp=xp)
        history = filters.push(history, windows.fast.value, xp=xp)
        past = filters.history_mean(history, self.history_memory, xp=xp)  # v2.0 31, 32
        fast = windows.fast.value
        fast = fast + self.history_correction * (past - fast)  # v2.0 33
        rose = (fast > before.fast.value) & (before.fast.weight > 0.0)
        return SensorState(
            windows=windows._replace(fast=windows.fast._replace(value=fast)),
            history=history,
            curvature=filters.curvature(
                state.curvature,
                signals.loss,
                signals.grad_norm,
                decay=self.curvature_decay,
                limit=self.curvature_limit,
                hold_missing=self.hold_missing_loss,
                xp=xp,
            ),
            rising=xp.where(rose, filters.next_count(rising, xp=xp), 0),
        )

    def warning(self, state: SensorState, *, xp: Any) -> Any:
        """`W`, the early-warning score (v2.0 40-43)."""
        fast, slow = state.windows.fast.value, state.windows.slow.value
        nothing = xp.zeros_like(fast)
        surge = xp.where(filters.ratio(fast, slow) > self.surge_ratio, self.surge_weight, nothing)
        bend = abs(state.curvature.value) > self.curvature_alarm
        bend = xp.where(bend, self.curvature_weight, nothing)
        trend = xp.where(state.rising >= TREND_STEPS, self.trend_weight, nothing)
        return surge + bend + trend

    def sensed_controls(
        self, state: SensorState, signals: Signals, ok: Any, *, xp: Any
    ) -> Controls:
        """The controls that `StabilityV2` and `Meta3` share: `beta1`, the clip, telemetry."""
        base = neutral(ok, xp=xp)
        fast, slow = state.windows.fast.value, state.windows.slow.value
        bend = state.curvature.value
        drive = xp.tanh((bend - self.beta1_offset) / self.beta1_temperature)
        controls = base._replace(
            beta1_factor=1.0 + self.beta1_gain * drive,  # v2.0 17
            beta1_min=base.beta1_max * self.beta1_bounds[0],  # v2.0 18
            beta1_max=base.beta1_max * self.beta1_bounds[1],
            phase=filters.phase(fast, slow),
            curvature=bend,
            warning=self.warning(state, xp=xp),
        )
        if self.clip_threshold is None:
            return controls
        threshold = 1.0 + self.clip_gain * root(filters.ratio(fast, slow), xp=xp)  # v2.0 24
        threshold = self.clip_threshold * threshold
        scale = clip_scale(threshold, signals.grad_norm, xp=xp)
        return controls._replace(
            clip_scale=xp.where(ok, scale, 1.0),
            clip_threshold=threshold,
        )


def check_windows(law: Any) -> None:
    """Raises unless the constants of both windows are in range."""
    for name in ("fast_decay", "slow_decay"):
        remedy = "0.9 (fast) and 0.999 (slow) are the paper's"
        check_range(name, getattr(law, name), 0.0, 1.0, upper_open=True, remedy=remedy)
    if law.outlier_cap is not None:
        remedy = "use 10, or None for no cap"
        check_range("outlier_cap", law.outlier_cap, 1.0, remedy=remedy)


def advance_windows(law: Any, state: filters.Windows, sigma: Any, *, xp: Any) -> filters.Windows:
    """Both windows after `sigma`, with the law's constants."""
    return filters.windows(
        state,
        sigma,
        fast_decay=law.fast_decay,
        slow_decay=law.slow_decay,
        debias=law.debias,
        outlier_cap=law.outlier_cap,
        xp=xp,
    )


def misled(law: Any, state: filters.Windows, sigma: Any) -> Any:
    """Whether the windows should start over, with the law's constants."""
    return filters.misled(state, sigma, slow_decay=law.slow_decay, outlier_cap=law.outlier_cap)


def control_error(law: Any, fast: Any, slow: Any) -> Any:
    """`e = v_fast - v_slow` (v2.0 4), divided by `v_slow + eps` unless told otherwise."""
    error = fast - slow
    return error / (slow + filters.EPS) if law.relative_error else error
