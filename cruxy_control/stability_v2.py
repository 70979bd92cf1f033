"""Stability v2: gamma norm with memory, curvature, predictive clipping, early warning."""

import dataclasses
import math
from typing import Any, NamedTuple, Self

from cruxy_control import filters
from cruxy_control.checks import check_bounds, check_count, check_range, make_plain
from cruxy_control.controls import Controls, clip_scale, neutral
from cruxy_control.signals import Signals
from cruxy_control.stability_v1 import advance_windows, check_windows, control_error, misled

TREND_STEPS = 5
"""`v_fast` counts as a trend once it rose this many steps running (v2.0 41)."""


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
        for name in ("history_memory", "beta1_temperature", "surge_ratio"):
            check_range(name, getattr(self, name), 0.0, lower_open=True, remedy="keep the default")
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
            rising=xp.where(rose, rising + 1, 0),
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
        threshold = 1.0 + self.clip_gain * xp.sqrt(filters.ratio(fast, slow))  # v2.0 24
        threshold = self.clip_threshold * threshold
        scale = clip_scale(threshold, signals.grad_norm, xp=xp)
        return controls._replace(
            clip_scale=xp.where(ok, scale, 1.0),
            clip_threshold=threshold,
        )


class StabilityV2State(NamedTuple):
    """What `StabilityV2` remembers.

    Attributes:
        sensors: the filters.
        error: `e`, the difference of the windows; float32, `()`.
        control: `u`, the bounded control signal; float32, `()`.
        scale: the running factor on the learning rate; float32, `()`.
    """

    sensors: SensorState
    error: Any
    control: Any
    scale: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class StabilityV2(V2Sensors):
    """Brakes where the phase is high, recovers where it is low; clips ahead of a surge.

    The rate is a running factor (v2.0 27-29). By default it is bounded to `[1e-3, 1]`: on a steady
    noisy stream it stays at 1, so this law only ever brakes. Unbounded it drifts up without end
    once the filters have settled.

    Attributes:
        proportional_gain: `kp`.
        derivative_gain: `kd`.
        relative_error: divides the error by `v_slow`; see `StabilityV1`.
        rising_temperature: `a` of `u = tanh((kp e + kd de) / a)` where `v_fast > v_slow`
            (v2.0 34).
        falling_temperature: `a` where it is smaller.
        level_temperature: `a` where both are equal.
        phase_curvature: the 0.1 of `phi (1 + 0.1 tanh c_bar)` (v2.0 26).
        high_phase: above it the factor is multiplied by `exp(-decay (phi - high_phase))`
            (v2.0 27, 28).
        phase_margin: below `high_phase - phase_margin` it is multiplied by
            `1 + recovery (high_phase - phi)` (v2.0 29).
        decay: see `high_phase`.
        recovery: see `phase_margin`.
        scale_bounds: bounds of the factor. They clamp what is stored, so it cannot wind up.
        beta2_gain: `beta2 = b2 (1 + beta2_gain u)` (v2.0 10).
        beta2_bounds: bounds of the result.
        alarm: the warning above which the emergency acts (v2.0 44, 45).
        alarm_brake: factor on the rate then.
        alarm_beta2: added to `beta2` then.
    """

    proportional_gain: float = 0.05
    derivative_gain: float = 0.02
    relative_error: bool = True
    rising_temperature: float = 0.15
    falling_temperature: float = 0.08
    level_temperature: float = 0.1
    phase_curvature: float = 0.1
    high_phase: float = 0.55
    phase_margin: float = 0.05
    decay: float = 0.15
    recovery: float = 0.08
    scale_bounds: tuple[float, float] = (1e-3, 1.0)
    beta2_gain: float = 0.15
    beta2_bounds: tuple[float, float] = (0.9, 0.9999)
    alarm: float = 0.7
    alarm_brake: float = 0.5
    alarm_beta2: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rising_temperature", "falling_temperature", "level_temperature"):
            check_range(name, getattr(self, name), 0.0, lower_open=True, remedy="use about 0.1")
        for name in (
            "proportional_gain",
            "derivative_gain",
            "phase_curvature",
            "decay",
            "recovery",
            "beta2_gain",
            "alarm",
            "alarm_beta2",
        ):
            check_range(name, getattr(self, name), 0.0, remedy="0 is the least")
        check_range("high_phase", self.high_phase, 0.0, 1.0, remedy="use 0.55")
        check_range("phase_margin", self.phase_margin, 0.0, 1.0, remedy="use 0.05")
        check_range("alarm_brake", self.alarm_brake, 0.0, 1.0, lower_open=True, remedy="use 0.5")
        remedy = "use (1e-3, 1), or (0, inf) for none"
        check_bounds("scale_bounds", self.scale_bounds, 0.0, math.inf, around=1.0, remedy=remedy)
        check_bounds("beta2_bounds", self.beta2_bounds, 0.0, 1.0, remedy="use (0.9, 0.9999)")

    @classmethod
    def cruxy_2_1_0(cls) -> Self:
        """The law as the package `cruxy` 2.1.0 computes it; it does not train most models."""
        return cls(
            debias=False,
            outlier_cap=None,
            curvature_limit=None,
            hold_missing_loss=False,
            relative_error=False,
            trend_weight=0.0,
            scale_bounds=(0.0, math.inf),
        )

    def init(self, like: Any, *, xp: Any) -> StabilityV2State:
        """The state before the first step, on the device of the 0-d array `like`."""
        nothing = filters.zero(like, xp=xp)
        sensors = self.init_sensors(like, xp=xp)
        return StabilityV2State(sensors, nothing, nothing, nothing + 1.0)

    def step(
        self, state: StabilityV2State, signals: Signals, *, xp: Any
    ) -> tuple[StabilityV2State, Controls]:
        """One step of the law: the new state, and the controls read from it."""
        ok = xp.isfinite(signals.grad_norm) & xp.isfinite(signals.gamma_norm)
        state = filters.select(ok, self._advance(state, signals, xp), state, xp=xp)
        return state, self._read(state, signals, ok, xp)

    def _phase(self, sensors: SensorState, xp: Any) -> Any:
        phi = filters.phase(sensors.windows.fast.value, sensors.windows.slow.value)
        bend = xp.tanh(sensors.curvature.value)
        return phi * (1.0 + self.phase_curvature * bend)  # v2.0 26

    def _emergency(self, sensors: SensorState, xp: Any) -> Any:
        return self.warning(sensors, xp=xp) > self.alarm  # v2.0 44

    def _advance(self, state: StabilityV2State, signals: Signals, xp: Any) -> StabilityV2State:
        sensors = self.sense(state.sensors, signals, xp=xp)
        fast, slow = sensors.windows.fast.value, sensors.windows.slow.value

        error = control_error(self, fast, slow)
        drive = self.proportional_gain * error
        drive = drive + self.derivative_gain * (error - state.error)
        level = xp.zeros_like(fast) + self.level_temperature
        temperature = xp.where(fast < slow, self.falling_temperature, level)
        temperature = xp.where(fast > slow, self.rising_temperature, temperature)  # v2.0 34

        phi = self._phase(sensors, xp)
        excess = phi - self.high_phase
        braked = xp.where(excess > 0.0, xp.exp(-self.decay * excess), 1.0)  # v2.0 27, 28
        recovered = 1.0 - self.recovery * excess  # v2.0 29
        scale = state.scale * xp.where(excess < -self.phase_margin, recovered, braked)
        emergency = self._emergency(sensors, xp)
        scale = xp.where(emergency, self.alarm_brake * scale, scale)  # v2.0 44
        scale = xp.clip(scale, *self.scale_bounds)
        return StabilityV2State(sensors, error, xp.tanh(drive / temperature), scale)

    def _read(self, state: StabilityV2State, signals: Signals, ok: Any, xp: Any) -> Controls:
        base = self.sensed_controls(state.sensors, signals, ok, xp=xp)
        emergency = self._emergency(state.sensors, xp)
        return base._replace(
            meta_scale=state.scale,
            beta2_phase=1.0 + self.beta2_gain * state.control,  # v2.0 10
            beta2_shift=xp.where(emergency, base.beta2_max * self.alarm_beta2, 0.0),  # v2.0 45
            beta2_min=base.beta2_max * self.beta2_bounds[0],
            beta2_max=base.beta2_max * self.beta2_bounds[1],
            phase=self._phase(state.sensors, xp),
        )
