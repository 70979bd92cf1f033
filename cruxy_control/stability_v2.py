"""Stability v2: brakes where the phase is high, recovers where it is low, acts on the warning."""

import dataclasses
import math
from typing import Any, NamedTuple, Self

from cruxy_control import filters
from cruxy_control.checks import check_bounds, check_range
from cruxy_control.controls import Controls
from cruxy_control.sensing import SENSED, SensorState, V2Sensors, control_error
from cruxy_control.signals import Signals


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

    telemetry = SENSED


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
            "alarm_beta2",
        ):
            check_range(name, getattr(self, name), 0.0, remedy="0 is the least")
        check_range("alarm", self.alarm, 0.0, math.inf, remedy="infinity never acts")
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
