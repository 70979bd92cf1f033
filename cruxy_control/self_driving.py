"""Self-driving: a rate that is found on the way, from how gradient and momentum agree."""

import dataclasses
from typing import Any, NamedTuple

from cruxy_control import filters
from cruxy_control.checks import check_bounds, check_count, check_range
from cruxy_control.controls import DRIVEN, RUN_PHASES, SCHEDULE_SHARE, Controls
from cruxy_control.progress import NoProgress, Progress, adapted, advance, measured, no_steps
from cruxy_control.sensing import SENSED, SensorState, V2Sensors
from cruxy_control.signals import NOT_KNOWN, Signals, known

SEARCH = 0.1
"""While the rate may still move by more than this in one step, it is looked for."""


class Cooldown(NamedTuple):
    """A fall of the rate to 0 that was begun on the way; `total_steps` is the law's own.

    Attributes:
        start: the value of `step` from which on it falls, the largest int32 for never; int32, `()`.
        steps: how many steps that takes; int32, `()`.
        height: the multiple of the scale from which it falls; float32, `()`.
        falling: the multiple that was applied last, where the rate falls; else 0; float32, `()`.
    """

    start: Any
    steps: Any
    height: Any
    falling: Any


class Hold(NamedTuple):
    """What has kept the rate from where the law alone would have it.

    Attributes:
        peak: the highest rate that was set so far; float32, `()`.
        limited_steps: for how many good steps in a row every rate was above the relative limit;
            int32, `()`.
        resisted: how often that was so though the alignment was positive, a count that fades and
            that a falling rate leaves as it is; float32, `()`.
    """

    peak: Any
    limited_steps: Any
    resisted: Any


class SelfDrivingState(NamedTuple):
    """What `SelfDriving` remembers.

    Attributes:
        sensors: the filters behind clipping and telemetry.
        alignment: the smoothed alignment.
        step: good steps so far that came after one that moved something; int32, `()`.
        scale: the factor on the learning rate that was found; float32, `()`.
        cooldown: a fall of the rate that was begun on the way.
        hold: what has kept the rate from where the law alone would have it.
        progress: what moves the set point; nothing where it is fixed.
    """

    sensors: SensorState
    alignment: filters.Ema
    step: Any
    scale: Any
    cooldown: Cooldown
    hold: Hold
    progress: Progress | NoProgress = NoProgress()

    telemetry = (*SENSED, "alignment", *DRIVEN)


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
    Where it is 0 the step before moved nothing, as at a rate of 0, and there is nothing to learn
    from: scale, average and `t` stay as they are.

    Where the end is known the rate is found in a first part of the run and then falls to 0: after
    `search_share * total_steps` steps the scale is held, and the rate is

        scale * cooldown_peak * (1 - k / K),    k = 0, 1, ..., K = (1 - search_share) total_steps.

    The rate that is found is that which an average of the iterates bears for ever; one that falls
    may start at twice of it, and moves more on the way: the relative limit is `cooldown_peak` times
    as high there, and where the end is known already in the search, after its first `gain_time`
    steps, in which a start that is far too low overshoots. `begin_cooldown` begins a fall at any
    step, and it then counts in place of `total_steps`. The end is the law's and not the state's: a
    run that is resumed under another `total_steps` ends there.

    A schedule is obeyed where it lowers the rate, once the search is over (`gain_t` below
    `SEARCH`): below `schedule_share` of the highest rate that was set so far (`Signals.base_rate`)
    the scale is held, since the sensor would ask for what the schedule has just taken. Before that,
    and where it rises, as a warm-up does, the law corrects the rate as it does without one.

    The relative limit gives way where nothing opposes the steps, as on a policy that improves or a
    net that has fitted its data. Of the steps in which the limit holds every tensor while
    `a_bar > 0` it keeps a count that fades, and multiplies the limit:

        n <- n + 1 there,  0.95 n elsewhere;    (1 + n / limit_yield)^(-1/2).

    With an `excess_share` the set point is moved by how high the iterate lies above its average, in
    units of how fast the loss falls (`cruxy_control.progress.adapted` has the formula): from
    `-excess_span`, where steps are small, through 0 at that share, to `excess_span`. It is
    `set_point` in the first 20 steps, in every step without a loss or an average, where an
    optimizer climbs, and the nearer to it the better the data are fitted.

    Clipping, guard and telemetry are those of `Meta3`; the decay rates stay as they are set.

    Attributes:
        alignment_decay: of the average `a_bar`.
        set_point: the alignment that is steered to, in `(-1, 1)`.
        gain: the largest change of the logarithm of the rate in the first step.
        gain_time: steps after which the gain is half of that.
        scale_bounds: bounds of the factor on the rate.
        total_steps: steps of the run, where they are known; `None` for a run without an end.
        search_share: share of them in which the rate is found, in `(0, 1)`.
        cooldown_peak: multiple of the rate that was found at which the fall begins, above 0; where
            it is above 1 also of the relative limit.
        schedule_share: share of the highest rate that was set below which a schedule teaches
            nothing, in `[0, 1]`; 0 lets the law work against every schedule.
        limit_yield: number of such steps after which the limit is down to 0.71 of itself, above 0;
            `None` for a limit that does not give way.
        excess_share: the excess over the average that is steered to, as a share of what the loss
            falls by with every factor of e in the number of steps, above 0; `None` for a set point
            that is fixed.
        excess_span: how far from 0 that may move the set point, in `(0, 1)`.

    Examples:
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
    total_steps: int | None = None
    search_share: float = 0.2
    cooldown_peak: float = 2.0
    schedule_share: float = SCHEDULE_SHARE
    limit_yield: float | None = 50.0
    excess_share: float | None = None
    excess_span: float = 0.6

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
        if self.total_steps is not None:
            check_count("total_steps", self.total_steps, 2, remedy="None is for a run without end")
        check_range("search_share", self.search_share, 0.0, 1.0, **ends, remedy="use 0.2")
        check_range("cooldown_peak", self.cooldown_peak, 0.0, lower_open=True, remedy="use 2")
        check_range("schedule_share", self.schedule_share, 0.0, 1.0, remedy="use 0.8")
        if self.limit_yield is not None:
            remedy = "use 50, or None for a limit that holds"
            check_range("limit_yield", self.limit_yield, 0.0, lower_open=True, remedy=remedy)
        if self.excess_share is not None:
            remedy = "use 0.5, or None for a set point that is fixed"
            check_range("excess_share", self.excess_share, 0.0, lower_open=True, remedy=remedy)
        check_range("excess_span", self.excess_span, 0.0, 1.0, **ends, remedy="use 0.6")

    @property
    def needs_alignment(self) -> bool:
        """Whether `Signals.alignment` and `Signals.limit_scale` have to be measured."""
        return True

    @property
    def needs_excess(self) -> bool:
        """Whether `Signals.excess` has to be measured as well."""
        return self.excess_share is not None

    def init(self, like: Any, *, xp: Any) -> SelfDrivingState:
        """The state before the first step, on the device of the 0-d array `like`."""
        zero = filters.zero(like, xp=xp)
        return SelfDrivingState(
            sensors=self.init_sensors(like, xp=xp),
            alignment=filters.Ema(zero, zero),
            step=filters.zero_count(like, xp=xp),
            scale=zero + 1.0,
            cooldown=Cooldown(
                start=filters.zero_count(like, xp=xp) + filters.MAX_COUNT,
                steps=filters.zero_count(like, xp=xp) + 1,
                height=zero + self.cooldown_peak,
                falling=zero + 0.0,
            ),
            hold=Hold(zero + 0.0, filters.zero_count(like, xp=xp), zero + 0.0),
            progress=no_steps(like, xp=xp) if self.needs_excess else NoProgress(),
        )

    def _fall(self, state: SelfDrivingState, xp: Any) -> tuple[Any, Any]:
        """Whether the rate falls in this step or has fallen, and the multiple of the scale then.

        A fall that was begun on the way counts, else the one to the end that is known.
        """
        asked = state.step >= state.cooldown.start
        start, steps, height = state.cooldown[:3]
        falls = asked
        if self.total_steps is not None:
            search = max(1, round(self.search_share * self.total_steps))
            never = state.cooldown.start == filters.MAX_COUNT
            falls = asked | (never & (state.step >= search))
            start = xp.where(never, search, start)
            steps = xp.where(never, max(1, self.total_steps - search), steps)
            height = xp.where(never, self.cooldown_peak, height)
        done = xp.where(falls, state.step - start, 0) / steps
        return falls, height * xp.clip(1.0 - done, 0.0, 1.0)

    def step(
        self, state: SelfDrivingState, signals: Signals, *, xp: Any
    ) -> tuple[SelfDrivingState, Controls]:
        """One step of the law: the new state, and the controls read from it."""
        ok = xp.isfinite(signals.grad_norm) & xp.isfinite(signals.gamma_norm)
        falls, multiple = self._fall(state, xp)
        new, set_point = self._advance(state, signals, falls, multiple, xp)
        state = filters.select(ok, new, state, xp=xp)
        controls = self.sensed_controls(state.sensors, signals, ok, xp=xp)
        scale = state.scale * xp.where(falls, multiple, 1.0)
        return state, controls._replace(
            meta_scale=scale,
            alignment=state.alignment.value,
            limit_factor=self._limit_factor(state, falls, xp),
            run_phase=self._phase(state, falls, multiple, xp),
            schedule_scale=_share(_of(signals.base_rate, 0.0, state), state.hold.peak, xp),
            # An array of its own: who keeps the signal writes the next one into it.
            limit_scale=_of(signals.limit_scale, 1.0, state) * xp.ones_like(scale),
            limited_steps=state.hold.limited_steps * xp.ones_like(scale),
            momentum_ratio=_of(signals.momentum_ratio, NOT_KNOWN, state),
            set_point=set_point * xp.ones_like(scale),
        )

    def _limit_factor(self, state: SelfDrivingState, falls: Any, xp: Any) -> Any:
        ends = falls if self.total_steps is None else falls | (state.step >= self.gain_time)
        factor = xp.where(ends, max(1.0, self.cooldown_peak), xp.ones_like(state.scale))
        if self.limit_yield is None:
            return factor
        return factor / xp.sqrt(1.0 + state.hold.resisted / self.limit_yield)

    def _phase(self, state: SelfDrivingState, falls: Any, multiple: Any, xp: Any) -> Any:
        search, trunk, cooldown, end = map(float, range(len(RUN_PHASES)))
        young = self._gain(state.step) > SEARCH
        if self.total_steps is not None:  # the whole of the first part
            young = state.cooldown.start == filters.MAX_COUNT
        falling = xp.where(multiple > 0.0, cooldown, end)
        return xp.where(falls, falling, xp.where(young, search, trunk)) * xp.ones_like(state.scale)

    def _gain(self, step: Any) -> Any:
        return self.gain * self.gain_time / (self.gain_time + step + 1.0)

    def _advance(
        self, state: SelfDrivingState, signals: Signals, held: Any, multiple: Any, xp: Any
    ) -> tuple[SelfDrivingState, Any]:
        """The state after a good step, and the alignment that was steered to in it."""
        # A gradient that nothing has moved since the last one agrees with it, at any rate.
        moved = signals.limit_scale > 0.0
        # A rate that falls tells nothing of the one that was found.
        base = _of(signals.base_rate, 0.0, state)
        peak = xp.maximum(state.hold.peak, base)
        obeys = (_share(base, peak, xp) < self.schedule_share) & (self._gain(state.step) <= SEARCH)
        free = moved & ~held & ~obeys
        sure = known(signals.alignment) & free
        sensed = xp.where(sure, signals.alignment, 0.0)
        alignment = filters.ema(state.alignment, sensed, self.alignment_decay, debias=True)
        alignment = filters.select(sure, alignment, state.alignment, xp=xp)
        ahead = self._progress(state, signals, moved, xp)
        gain = self._gain(state.step)
        set_point = self._set_point(ahead, signals, xp)
        error = xp.clip(alignment.value - set_point, -1.0, 1.0)
        scale = state.scale * xp.where(free, signals.limit_scale, 1.0)
        scale = scale * xp.where(sure, xp.exp(gain * error), 1.0)
        new = SelfDrivingState(
            sensors=self.sense(state.sensors, signals, xp=xp),
            alignment=alignment,
            step=xp.where(moved, filters.next_count(state.step, xp=xp), state.step),
            scale=xp.clip(scale, *self.scale_bounds),
            cooldown=state.cooldown._replace(falling=xp.where(held, multiple, 0.0)),
            hold=self._hold(state, signals.limit_scale, alignment.value, held, peak, xp),
            progress=ahead,
        )
        return new, set_point

    def _progress(self, state: SelfDrivingState, signals: Signals, moved: Any, xp: Any) -> Any:
        old = state.progress
        if not isinstance(old, Progress) or signals.excess is None:
            return old
        norms = signals.gamma_norm, state.sensors.windows.slow.value
        new = advance(old, signals.excess, signals.loss, *norms, xp=xp)
        return filters.select(moved, new, old, xp=xp)

    def _set_point(self, state: Any, signals: Signals, xp: Any) -> Any:
        """The alignment that is steered to in this step."""
        share = self.excess_share
        # A run that began under a law without it has no progress.
        if share is None or signals.excess is None or not isinstance(state, Progress):
            return self.set_point
        asked = adapted(state, self.set_point, share, self.excess_span, xp=xp)
        sure = measured(signals.excess, signals.loss)
        return xp.where(sure, asked, self.set_point)

    def _hold(
        self,
        state: SelfDrivingState,
        limit_scale: Any,
        alignment: Any,
        held: Any,
        peak: Any,
        xp: Any,
    ) -> Hold:
        count, resisted = state.hold.limited_steps, state.hold.resisted
        limited = (limit_scale > 0.0) & (limit_scale < 1.0)
        more = xp.where(limited & (alignment > 0.0), resisted + 1.0, 0.95 * resisted)
        return Hold(
            peak=peak,
            limited_steps=xp.where(limited, filters.next_count(count, xp=xp), 0),
            resisted=xp.where((limit_scale > 0.0) & ~held, xp.clip(more, 0.0, 1e9), resisted),
        )


def _of(signal: Any, missing: float, state: SelfDrivingState) -> Any:
    """A signal that who steps the law may leave out."""
    return state.scale * 0.0 + missing if signal is None else signal


def _share(base: Any, peak: Any, xp: Any) -> Any:
    """The share that a schedule has left of its highest rate; 1 before there is one."""
    falls = base < peak  # of equal ones XLA's quotient on a GPU may be below 1
    return xp.where(falls, base / xp.where(falls, peak, 1.0), 1.0)


def check_cooldown(steps: Any) -> None:
    """Raises unless these are steps of a cooldown: a whole number from 1 to the last int32.

    Raises:
        ValueError: with the rule, the value received and the remedy.
    """
    remedy = "give the steps that are left"
    count = check_count("steps", steps, 1, remedy=remedy)
    check_range("steps", count, 1, filters.MAX_COUNT, remedy=remedy)


def begin_cooldown(state: SelfDrivingState, steps: Any, *, xp: Any) -> SelfDrivingState:
    """The state of a run whose rate falls to 0 from now on.

    Args:
        state: of `SelfDriving`. If its rate falls already it goes on from where it is; one that has
            ended begins again.
        steps: until it is 0; a number or an int32 scalar, taken as at least 1.
        xp: the array namespace.
    """
    start, _, height, falling = state.cooldown
    steps = xp.clip(xp.zeros_like(start) + steps, 1, filters.MAX_COUNT)
    height = xp.where(falling > 0.0, falling, height)
    # Sums, for arrays of their own: who donates the state gives each once.
    return state._replace(cooldown=Cooldown(state.step + 0, steps, height, falling + 0.0))
