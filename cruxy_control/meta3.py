"""Meta3: a slow loop that moves the rate and `beta2`, a fast loop that follows the phase."""

import dataclasses
import math
from typing import Any, NamedTuple, Self

from cruxy_control import filters
from cruxy_control.checks import check_bounds, check_count, check_range
from cruxy_control.controls import Controls
from cruxy_control.sensing import SENSED, SensorState, V2Sensors, misled
from cruxy_control.signals import Signals

Z_EPS = 1e-6
"""The `eps` of `z`; every other denominator has 1e-8."""


class Meta3State(NamedTuple):
    """What `Meta3` remembers.

    Attributes:
        sensors: the filters.
        reference: the last values of `v_fast`; float32, `(reference_window,)`.
        step: good steps so far; int32, `()`.
        scale: the slow factor on the learning rate; float32, `()`.
        beta2_gap: the slow factor on `1 - b2`; float32, `()`.
    """

    sensors: SensorState
    reference: Any
    step: Any
    scale: Any
    beta2_gap: Any

    telemetry = SENSED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meta3(V2Sensors):
    """The hierarchical controller, on the sensors of `StabilityV2`.

    Every `meta_interval` steps `z = (v_fast - v_ref) / (v_ref + eps)` moves the rate by
    `exp(-rate_gain tanh z)` (WP 9) and `beta2` by `beta2_gain tanh(z) (1 - beta2)` (WP 10); each
    step the phase throttles both (WP 7). On a steady gradient `phi` is 0.5: the rate is then 0.75
    of the one that was set, and `beta2` is at its lower bound whatever was set. `phase_strength=0`
    and `beta2_phase_strength=0` switch the fast loop off, `rate_gain=0` and `beta2_gain=0` the slow
    one.

    Attributes:
        meta_interval: steps between two moves of the slow loop.
        reference_window: length of the mean `v_ref` (WP 8).
        rate_gain: the 0.05 of WP 9.
        beta2_gain: the 0.03 of WP 10.
        phase_strength: the 0.5 of `eta (1 - 0.5 phi)` (WP 7).
        beta2_phase_strength: the 0.3 of `beta2 (1 - 0.3 phi)`.
        scale_bounds: bounds of the slow factor on the rate. They clamp what is stored, so it
            cannot wind up.
        beta2_gap_bounds: the same for the slow factor on `1 - beta2`.
        beta2_bounds: bounds of the result (v2.0 5.5.2).

    Examples:
        >>> import numpy as np
        >>> from cruxy_control import Meta3, Signals
        >>> law = Meta3()
        >>> state = law.init(np.float32(0.0), xp=np)
        >>> one = np.float32(1.0)
        >>> state, controls = law.step(state, Signals(one, one, one), xp=np)
        >>> float(controls.phase), float(controls.phase_scale), float(controls.clip_threshold)
        (0.5, 0.75, 1.5)
    """

    meta_interval: int = 10
    reference_window: int = 50
    rate_gain: float = 0.05
    beta2_gain: float = 0.03
    phase_strength: float = 0.5
    beta2_phase_strength: float = 0.3
    scale_bounds: tuple[float, float] = (1e-2, 10.0)
    beta2_gap_bounds: tuple[float, float] = (1e-2, 100.0)
    beta2_bounds: tuple[float, float] = (0.9, 0.99999)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("meta_interval", self.meta_interval, 1, remedy="use 10")
        check_count("reference_window", self.reference_window, 2, remedy="use 50")
        remedy = "0 switches it off"
        check_range("rate_gain", self.rate_gain, 0.0, remedy=remedy)
        for name in ("beta2_gain", "phase_strength", "beta2_phase_strength"):
            check_range(name, getattr(self, name), 0.0, 1.0, upper_open=True, remedy=remedy)
        for name in ("scale_bounds", "beta2_gap_bounds"):
            remedy = "keep the default, or (0, inf) for none"
            check_bounds(name, getattr(self, name), 0.0, math.inf, around=1.0, remedy=remedy)
        check_bounds("beta2_bounds", self.beta2_bounds, 0.0, 1.0, remedy="use (0.9, 0.99999)")

    @classmethod
    def cruxy_2_1_0(cls) -> Self:
        """The law as the package `cruxy` 2.1.0 computes it.

        The package also clamps the final rate to `[1e-7, 1e-2]`; that bound is on the user's rate
        and belongs to whoever applies it (`meta_learning_rate(bounds=...)`).
        """
        return cls(
            debias=False,
            outlier_cap=None,
            curvature_limit=None,
            hold_missing_loss=False,
            trend_weight=0.0,
            scale_bounds=(0.0, math.inf),
            beta2_gap_bounds=(0.0, math.inf),
        )

    def init(self, like: Any, *, xp: Any) -> Meta3State:
        """The state before the first step, on the device of the 0-d array `like`."""
        one = filters.zero(like, xp=xp) + 1.0
        return Meta3State(
            sensors=self.init_sensors(like, xp=xp),
            reference=filters.empty_ring(self.reference_window, like, xp=xp),
            step=filters.zero_count(like, xp=xp),
            scale=one,
            beta2_gap=one,
        )

    def step(self, state: Meta3State, signals: Signals, *, xp: Any) -> tuple[Meta3State, Controls]:
        """One step of the law: the new state, and the controls read from it."""
        ok = xp.isfinite(signals.grad_norm) & xp.isfinite(signals.gamma_norm)
        state = filters.select(ok, self._advance(state, signals, xp), state, xp=xp)
        return state, self._read(state, signals, ok, xp)

    def _advance(self, state: Meta3State, signals: Signals, xp: Any) -> Meta3State:
        sensors = self.sense(state.sensors, signals, xp=xp)
        fast = sensors.windows.fast.value
        over = misled(self, state.sensors.windows, signals.gamma_norm)
        reference = filters.reset(over, filters.UNFILLED, state.reference, xp=xp)
        reference = filters.push(reference, fast, xp=xp)
        mean = filters.ring_mean(reference, xp=xp)  # WP 8
        surge = xp.tanh((fast - mean) / (mean + Z_EPS))  # WP 9: tanh z
        step = filters.next_count(state.step, xp=xp)
        due = (step % self.meta_interval == 0) & (step >= 2)
        scale = xp.clip(state.scale * xp.exp(-self.rate_gain * surge), *self.scale_bounds)  # WP 9
        # WP 10: beta2 + k tanh(z) (1 - beta2) leaves 1 - beta2 times (1 - k tanh z).
        gap = xp.clip(state.beta2_gap * (1.0 - self.beta2_gain * surge), *self.beta2_gap_bounds)
        return Meta3State(
            sensors=sensors,
            reference=reference,
            step=step,
            scale=xp.where(due, scale, state.scale),
            beta2_gap=xp.where(due, gap, state.beta2_gap),
        )

    def _read(self, state: Meta3State, signals: Signals, ok: Any, xp: Any) -> Controls:
        base = self.sensed_controls(state.sensors, signals, ok, xp=xp)
        return base._replace(
            meta_scale=state.scale,
            phase_scale=1.0 - self.phase_strength * base.phase,  # WP 7
            beta2_gap=state.beta2_gap,
            beta2_phase=1.0 - self.beta2_phase_strength * base.phase,
            beta2_min=base.beta2_max * self.beta2_bounds[0],
            beta2_max=base.beta2_max * self.beta2_bounds[1],
        )
