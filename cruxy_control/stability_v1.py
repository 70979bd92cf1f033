"""Stability v1: two windows over the squared gradient norm and a PD controller."""

import dataclasses
from typing import Any, NamedTuple, Self

from cruxy_control import filters
from cruxy_control.checks import check_bounds, check_range, make_plain
from cruxy_control.controls import Controls, neutral
from cruxy_control.sensing import advance_windows, check_windows, control_error, misled
from cruxy_control.signals import Signals


class StabilityV1State(NamedTuple):
    """What `StabilityV1` remembers.

    Attributes:
        windows: the fast and slow average of `sigma`.
        error: `e`, their difference; float32, `()`.
        control: `u`, the bounded control signal; float32, `()`.
    """

    windows: filters.Windows
    error: Any
    control: Any

    telemetry = ("meta_scale", "phase_scale", "phase")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StabilityV1:
    """Slows the rate where the gradient grows, speeds it up where it settles; steers `beta2`.

    `sigma = sum g^2` (v2.0 1, 2), no curvature, no clipping, `beta1` as configured.

    Attributes:
        fast_decay: decay of `v_fast` (WP 2).
        slow_decay: decay of `v_slow` (WP 3).
        proportional_gain: `kp` (v2.0 5).
        derivative_gain: `kd` (v2.0 6).
        temperature: `tau` (v2.0 7).
        relative_error: divides the error by `v_slow`. Undivided it has the units of the squared
            gradient, and `u` is saturated or dead for almost every model.
        high_phase: above it the rate is `1 - brake * phi` (v2.0 9).
        low_phase: below it the rate is `1 + boost * (1 - phi)` (v2.0 9).
        brake: see `high_phase`.
        boost: see `low_phase`.
        beta2_gain: `beta2 = b2 (1 + beta2_gain u)` (v2.0 10).
        beta2_bounds: bounds of the result (v2.0 10).
        debias: bias-corrects both averages; without it `phi` is an artefact of their start at 0
            for the first thousand steps.
        outlier_cap: the averages see at most this multiple of `v_slow`; `None` for no cap.

    Raises:
        ValueError: where a constant is outside its range.

    Examples:
        >>> import numpy as np
        >>> from cruxy_control import Signals, StabilityV1
        >>> law = StabilityV1()
        >>> state = law.init(np.float32(0.0), xp=np)
        >>> one = np.float32(1.0)
        >>> state, controls = law.step(state, Signals(one, one, one), xp=np)
        >>> float(controls.phase), float(controls.phase_scale)
        (0.5, 1.0)
    """

    fast_decay: float = 0.9
    slow_decay: float = 0.999
    proportional_gain: float = 0.05
    derivative_gain: float = 0.02
    temperature: float = 0.1
    relative_error: bool = True
    high_phase: float = 0.55
    low_phase: float = 0.45
    brake: float = 0.3
    boost: float = 0.2
    beta2_gain: float = 0.15
    beta2_bounds: tuple[float, float] = (0.9, 0.9999)
    debias: bool = True
    outlier_cap: float | None = 10.0

    def __post_init__(self) -> None:
        make_plain(self)
        check_windows(self)
        for name in ("proportional_gain", "derivative_gain", "boost", "beta2_gain"):
            check_range(name, getattr(self, name), 0.0, remedy="0 switches it off")
        check_range("brake", self.brake, 0.0, 1.0, upper_open=True, remedy="0 switches it off")
        check_range("temperature", self.temperature, 0.0, lower_open=True, remedy="use 0.1")
        check_range("low_phase", self.low_phase, 0.0, 1.0, remedy="use 0.45")
        check_range("high_phase", self.high_phase, self.low_phase, 1.0, remedy="use 0.55")
        check_bounds("beta2_bounds", self.beta2_bounds, 0.0, 1.0, remedy="use (0.9, 0.9999)")

    @property
    def gamma(self) -> float:
        """The sensor's exponent: `sigma` is the square of the Euclidean norm."""
        return 2.0

    @classmethod
    def cruxy_2_1_0(cls) -> Self:
        """The law as the package `cruxy` 2.1.0 computes it."""
        return cls(debias=False, outlier_cap=None, relative_error=False)

    def init(self, like: Any, *, xp: Any) -> StabilityV1State:
        """The state before the first step, on the device of the 0-d array `like`."""
        nothing = filters.zero(like, xp=xp)
        return StabilityV1State(filters.empty_windows(like, xp=xp), nothing, nothing)

    def step(
        self, state: StabilityV1State, signals: Signals, *, xp: Any
    ) -> tuple[StabilityV1State, Controls]:
        """One step of the law: the new state, and the controls read from it."""
        sigma = signals.grad_norm * signals.grad_norm
        ok = xp.isfinite(signals.grad_norm) & xp.isfinite(signals.gamma_norm) & xp.isfinite(sigma)
        state = filters.select(ok, self._advance(state, sigma, xp), state, xp=xp)
        return state, self._read(state, ok, xp)

    def _advance(self, state: StabilityV1State, sigma: Any, xp: Any) -> StabilityV1State:
        windows = filters.reset(misled(self, state.windows, sigma), 0.0, state.windows, xp=xp)
        windows = advance_windows(self, windows, sigma, xp=xp)
        error = control_error(self, windows.fast.value, windows.slow.value)
        drive = self.proportional_gain * error  # v2.0 5
        drive = drive + self.derivative_gain * (error - state.error)  # v2.0 6
        return StabilityV1State(windows, error, xp.tanh(drive / self.temperature))  # v2.0 7, 8

    def _read(self, state: StabilityV1State, ok: Any, xp: Any) -> Controls:
        phi = filters.phase(state.windows.fast.value, state.windows.slow.value)  # v2.0 3
        slower = xp.where(phi > self.high_phase, 1.0 - self.brake * phi, 1.0)  # v2.0 9
        faster = 1.0 + self.boost * (1.0 - phi)
        base = neutral(ok, xp=xp)
        return base._replace(
            phase_scale=xp.where(phi < self.low_phase, faster, slower),
            beta2_phase=1.0 + self.beta2_gain * state.control,  # v2.0 10
            beta2_min=base.beta2_max * self.beta2_bounds[0],
            beta2_max=base.beta2_max * self.beta2_bounds[1],
            phase=phi,
        )
