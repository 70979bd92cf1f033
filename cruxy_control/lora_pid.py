"""Two PID loops on what a tensor does: how much of its direction is sign, and how far it may go."""

import dataclasses
from typing import Any, NamedTuple

from cruxy_control import filters
from cruxy_control.checks import check_bounds, check_count, check_range, make_plain
from cruxy_control.signals import NOT_KNOWN, known

LARGE = 0.25
"""An entry is large above this multiple of the root mean square (Tiger's)."""


def large_share(d: Any, rms: Any, *, xp: Any) -> Any:
    """The share of entries with `|d| > 0.25 rms(d)`, the sensor of `LoraPid`.

    It is 1 for a sign, 0.80 for normal noise, and small where a few entries carry all of it.

    Args:
        d: a direction, or a part of one; any shape. The shares of equal parts are averaged.
        rms: root mean square of the whole direction; a scalar.
        xp: the array namespace.

    Returns:
        A float32 scalar in `[0, 1]`; 0 where `rms` is 0.

    Examples:
        >>> import numpy as np
        >>> from cruxy_control import large_share
        >>> d = np.array([4.0, 0.1, -0.1, -4.0], np.float32)
        >>> float(large_share(d, np.sqrt(np.mean(d * d)), xp=np))
        0.5
    """
    one = xp.ones_like(d, dtype=xp.float32)
    return xp.mean(xp.where(abs(d) > LARGE * rms, one, 0.0))


class _Loop(NamedTuple):
    """One PID loop: what it moves, and what it remembers of its error."""

    value: Any
    integral: Any
    error: Any
    volatility: Any
    flips: Any


class LoraPidState(NamedTuple):
    """What `LoraPid` remembers; every field float32, `()` or one a tensor, `(n,)`.

    Attributes:
        rho: the average of the share of large entries.
        rho_weight: the share of it that observations fill.
        wait: steps since the loops moved last.
        blend: the share of the momentum in the direction.
        blend_integral: the sum of its errors, held within `anti_windup`.
        blend_error: its last error; `NOT_KNOWN` before the first.
        blend_volatility: the average of the size of the error's changes.
        blend_flips: the average of how often the error changes its sign, from 0 to 1.
        agc: the largest norm of the direction over that of the tensor.
        agc_integral: as for `blend`, and so the next.
        agc_error: likewise.
        agc_volatility: likewise.
        agc_flips: likewise.
    """

    rho: Any
    rho_weight: Any
    wait: Any
    blend: Any
    blend_integral: Any
    blend_error: Any
    blend_volatility: Any
    blend_flips: Any
    agc: Any
    agc_integral: Any
    agc_error: Any
    agc_volatility: Any
    agc_flips: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraPid:
    """Moves the blend of a sign and the clip by the parameter's norm, a tensor at a time.

    Where most entries of a direction are large (`rho` near 1) all of them have something to say,
    and the momentum itself may speak: the blend rises, the clip tightens. Where a few carry it
    (`rho` near 0) the sign weighs more. Tiger does so for LoRA's matrices. `rho` is the
    bias-corrected average of `large_share`; the set points are

        blend* = blend_base + blend_slope rho,    agc* = agc_base + agc_slope rho,

    and every `interval` steps each loop moves its value `x` by its error `e = x* - x`:

        x <- clip(x + kp e + ki / (1 + inertia_i volatility) I + kd / (1 + inertia_d flips) D),
        I = clip(I + e, -anti_windup, anti_windup),    D = e - e_before,

    where `volatility` is the average of `|D|` and `flips` that of 1 where `e` has changed its sign
    and 0 elsewhere, both from 0 and with the decay `memory`. An error that jumps slows the
    integral, one that swings the derivative: that is the loop's inertia. `D` is 0 on the first
    move.

    Attributes:
        interval: steps between two moves, at least 1.
        rho_decay: of the average of the share, each step, in `[0, 1)`.
        blend: where the blend starts.
        blend_base: its set point at `rho = 0`.
        blend_slope: what `rho = 1` adds to that.
        blend_bounds: bounds of the blend, within `[0, 1]`.
        agc: where the clip starts; above 0.
        agc_base: its set point at `rho = 0`.
        agc_slope: what `rho = 1` adds to that.
        agc_bounds: bounds of the clip, above 0.
        kp: gain on the error, at least 0.
        ki: gain on its integral, at least 0.
        kd: gain on its change, at least 0.
        anti_windup: the largest size of the integral, at least 0.
        inertia_i: what volatility takes from `ki`, at least 0.
        inertia_d: what flips take from `kd`, at least 0.
        memory: decay of volatility and flips, a move, in `[0, 1)`.

    Raises:
        ValueError: where a constant is outside its range, or a start or a set point outside the
            bounds of what it is for.

    Examples:
        >>> import numpy as np
        >>> from cruxy_control import LoraPid
        >>> pid, ok = LoraPid(interval=1), np.True_
        >>> state = pid.init(np.zeros(2, np.float32), xp=np)  # one for each of two tensors
        >>> for _ in range(40):
        ...     state, (blend, agc) = pid.step(state, np.float32([0.25, 1.0]), ok, xp=np)
        >>> print(blend.round(2), agc.round(3))
        [0.2 0.5] [0.04 0.01]
    """

    interval: int = 20
    rho_decay: float = 0.9
    blend: float = 0.2
    blend_base: float = 0.1
    blend_slope: float = 0.4
    blend_bounds: tuple[float, float] = (0.0, 1.0)
    agc: float = 0.02
    agc_base: float = 0.05
    agc_slope: float = -0.04
    agc_bounds: tuple[float, float] = (1e-3, 1.0)
    kp: float = 0.6
    ki: float = 0.05
    kd: float = 0.1
    anti_windup: float = 0.5
    inertia_i: float = 1.8
    inertia_d: float = 2.25
    memory: float = 0.9

    def __post_init__(self) -> None:
        make_plain(self)
        check_count("interval", self.interval, 1, remedy="use 20")
        for name in ("rho_decay", "memory"):
            value = getattr(self, name)
            check_range(name, value, 0.0, 1.0, upper_open=True, remedy="use 0.9")
        for name in ("kp", "ki", "kd", "anti_windup", "inertia_i", "inertia_d"):
            check_range(name, getattr(self, name), 0.0, remedy="0 switches it off")
        for name in ("blend_base", "blend_slope", "agc_base", "agc_slope"):
            check_range(name, getattr(self, name), remedy="keep the default")
        check_bounds("blend_bounds", self.blend_bounds, 0.0, 1.0, remedy="use (0, 1)")
        remedy = "use (1e-3, 1)"
        lower, _ = check_bounds("agc_bounds", self.agc_bounds, 0.0, 1e30, remedy=remedy)
        check_range("the lower end of agc_bounds", lower, 0.0, lower_open=True, remedy=remedy)
        for name, bounds in (("blend", self.blend_bounds), ("agc", self.agc_bounds)):
            base, slope = getattr(self, f"{name}_base"), getattr(self, f"{name}_slope")
            remedy = f"keep it within {name}_bounds"
            check_range(name, getattr(self, name), *bounds, remedy=remedy)
            check_range(f"{name}_base", base, *bounds, remedy=remedy)
            check_range(f"{name}_base + {name}_slope", base + slope, *bounds, remedy=remedy)

    def init(self, like: Any, *, xp: Any) -> LoraPidState:
        """The state before the first step.

        Args:
            like: an array of the shape of every field, `()`, or `(n,)` for one pair of loops a
                tensor, on the device where they are to be.
            xp: the array namespace, `numpy`, `jax.numpy` or `torch`.
        """
        zero = filters.zero(like, xp=xp)
        blend, agc = (
            _Loop(zero + start, zero, zero + NOT_KNOWN, zero, zero)
            for start in (self.blend, self.agc)
        )
        return LoraPidState(zero, zero, zero, *blend, *agc)

    def step(
        self, state: LoraPidState, rho_now: Any, ok: Any, *, xp: Any
    ) -> tuple[LoraPidState, tuple[Any, Any]]:
        """One step: the new state, and the blend and the clip to use.

        Args:
            state: the last step's.
            rho_now: `large_share` of this step's direction, like the fields of the state; counted
                as in `[0, 1]`, which a sum over parts may leave by a rounding. Where it is not
                finite the state stays as it was.
            ok: whether the step counts, a boolean scalar or one a tensor; where false the state
                stays as it was.
            xp: the array namespace.

        Returns:
            The state, and `(blend, agc)` after this step.
        """
        ok = ok & xp.isfinite(rho_now)
        seen = xp.clip(xp.where(ok, rho_now, 0.0), 0.0, 1.0)
        rho = filters.Ema(state.rho, state.rho_weight)
        rho = filters.ema(rho, seen, self.rho_decay, debias=True)
        blend, agc = _Loop(*state[3:8]), _Loop(*state[8:])
        due = state.wait + 1.0 >= self.interval
        target = self.blend_base + self.blend_slope * rho.value
        moved_blend = self._moved(blend, target, self.blend_bounds, xp)
        target = self.agc_base + self.agc_slope * rho.value
        moved_agc = self._moved(agc, target, self.agc_bounds, xp)
        new = LoraPidState(
            *rho,
            xp.where(due, 0.0, state.wait + 1.0),
            *filters.select(due, moved_blend, blend, xp=xp),
            *filters.select(due, moved_agc, agc, xp=xp),
        )
        state = filters.select(ok, new, state, xp=xp)
        return state, (state.blend, state.agc)

    def _moved(self, loop: _Loop, target: Any, bounds: tuple[float, float], xp: Any) -> _Loop:
        """One loop after a move towards its set point."""
        error = target - loop.value
        before = xp.where(known(loop.error), loop.error, error)
        change = error - before
        flipped = xp.where(error * before < 0.0, xp.ones_like(error), 0.0)
        volatility = self.memory * loop.volatility + (1.0 - self.memory) * abs(change)
        flips = self.memory * loop.flips + (1.0 - self.memory) * flipped
        integral = xp.clip(loop.integral + error, -self.anti_windup, self.anti_windup)
        ki = self.ki / (1.0 + self.inertia_i * volatility)
        kd = self.kd / (1.0 + self.inertia_d * flips)
        value = loop.value + self.kp * error + ki * integral + kd * change
        return _Loop(xp.clip(value, *bounds), integral, error, volatility, flips)
