"""A guard for plateaus: where the loss stands still, no sign and little decay, under any law."""

import dataclasses
from typing import Any, NamedTuple

from cruxy_control import filters
from cruxy_control.checks import check_count, check_range, make_plain
from cruxy_control.controls import Controls
from cruxy_control.law import Law, check_law, needs_alignment, needs_excess
from cruxy_control.sensing import SENSED
from cruxy_control.signals import NOT_KNOWN, Signals, known

YOUNG = 0.5
"""While the average of the loss is filled less than this, its first values are still most of it."""


class PlateauGuardState(NamedTuple):
    """What `PlateauGuard` remembers.

    Attributes:
        inner: the state of the law it wraps.
        loss: the smoothed loss.
        best: the smoothed loss at its last improvement; float32, `()`.
        count: steps with a loss since then; int32, `()`.
        level: `Controls.sign_weight`, from 0 on a plateau to 1; float32, `()`.
    """

    inner: Any
    loss: filters.Ema
    best: Any
    count: Any
    level: Any

    @property
    def telemetry(self) -> tuple[str, ...]:
        """What the wrapped law has something to say of, and what the guard moves."""
        inner = getattr(self.inner, "telemetry", (*SENSED, "alignment"))
        return (*inner, "sign_weight", "decay_scale")


@dataclasses.dataclass(frozen=True)
class PlateauGuard:
    """Any law, with a guard that takes sign and decay away where the loss stands still.

    A sign has the same size however flat the loss is, and weight decay pulls on where the gradient
    no longer holds against it: together they can keep a run from coming closer. After `patience`
    steps in which the smoothed loss `L` has not fallen below its best by `threshold`,

        L > best - threshold |best|,

    `sign_weight` goes to 0 and `decay_scale` to `decay`. With the next improvement both begin to go
    back to 1, evenly over `recovery` steps:

        level <- min(1, level + 1 / recovery),
        sign_weight = level,    decay_scale = 1 - (1 - decay) (1 - level)

    A step without a known loss, or one that is skipped, leaves the guard as it is; without losses
    it never acts. So does a step after one in which nothing moved, at a rate of 0 or at the end of
    a cooldown: `Signals.limit_scale` is then 0. It is measured only for a law that needs the
    alignment, as `SelfDriving` does; under all others such a step counts as any. All other orders
    are those of the wrapped law. `sign_weight` is obeyed by directions that blend a sign with
    something else, `decay_scale` by the weight decay of every optimizer here. The best is that of
    the whole run: a loss that has risen for good, as on other data, keeps the guard at work.

    Attributes:
        law: the law that is wrapped, with its constants.
        patience: steps with a loss and without an improvement until the guard acts, at least 1.
        threshold: the smallest relative improvement that counts, in `[0, 1)`.
        decay: factor on the weight decay on a plateau, in `[0, 1]`; 1 leaves it alone.
        recovery: steps with a loss until both factors are 1 again, at least 1; `None` for half the
            patience.
        loss_decay: of the average of the loss, in `[0, 1)`. While it is less than half filled, the
            first 14 steps at 0.95, every step counts as an improvement.

    Raises:
        TypeError: where `law` is none.
        ValueError: where a constant is outside its range.

    Examples:
        >>> import numpy as np
        >>> from cruxy_control import Meta3, PlateauGuard, Signals
        >>> law, one = PlateauGuard(Meta3(), patience=10), np.float32(1.0)
        >>> state = law.init(np.float32(0.0), xp=np)
        >>> for loss in [1.0] * 30 + [0.5] * 3:
        ...     state, controls = law.step(state, Signals(one, one, np.float32(loss)), xp=np)
        ...     if state.count in (9, 10) or loss < 1.0:
        ...         print(f"{controls.sign_weight:.1f} {controls.decay_scale:.2f}")
        1.0 1.00
        0.0 0.10
        0.2 0.28
        0.4 0.46
        0.6 0.64
    """

    law: Law
    patience: int = 200
    threshold: float = 1e-4
    decay: float = 0.1
    recovery: int | None = None
    loss_decay: float = 0.95

    def __post_init__(self) -> None:
        check_law(self.law)
        make_plain(self)
        check_count("patience", self.patience, 1, remedy="use 200")
        remedy = "use 1e-4"
        check_range("threshold", self.threshold, 0.0, 1.0, upper_open=True, remedy=remedy)
        check_range("decay", self.decay, 0.0, 1.0, remedy="use 0.1, or 1 to leave the decay alone")
        if self.recovery is not None:
            check_count("recovery", self.recovery, 1, remedy="use None for half the patience")
        remedy = "use 0.95, or 0 for no smoothing"
        check_range("loss_decay", self.loss_decay, 0.0, 1.0, upper_open=True, remedy=remedy)

    @property
    def gamma(self) -> float:
        """Exponent of the norm that the wrapped law wants."""
        return self.law.gamma

    @property
    def needs_alignment(self) -> bool:
        """Whether the wrapped law reads `Signals.alignment` and `Signals.limit_scale`."""
        return needs_alignment(self.law)

    @property
    def needs_excess(self) -> bool:
        """Whether it reads `Signals.excess`."""
        return needs_excess(self.law)

    @property
    def steers_decay(self) -> bool:
        """Whether `Controls.sign_weight` and `Controls.decay_scale` are moved."""
        return True

    def init(self, like: Any, *, xp: Any) -> PlateauGuardState:
        """The state before the first step, on the device of the 0-d array `like`."""
        zero = filters.zero(like, xp=xp)
        return PlateauGuardState(
            inner=self.law.init(like, xp=xp),
            loss=filters.Ema(zero, zero),
            best=zero + NOT_KNOWN,
            count=filters.zero_count(like, xp=xp),
            level=zero + 1.0,
        )

    def step(
        self, state: PlateauGuardState, signals: Signals, *, xp: Any
    ) -> tuple[PlateauGuardState, Controls]:
        """One step of both: the new state, and the controls read from it."""
        inner, controls = self.law.step(state.inner, signals, xp=xp)
        sure = controls.ok & known(signals.loss)
        if signals.limit_scale is not None:  # the loss of a model that stands still is no plateau
            sure = sure & (signals.limit_scale > 0.0)
        new = self._advance(state, xp.where(sure, signals.loss, state.loss.value), xp)
        sure = sure & xp.isfinite(new.loss.value)  # a difference of two losses may overflow
        own = zip(new[1:], state[1:], strict=True)
        state = PlateauGuardState(inner, *(filters.select(sure, n, o, xp=xp) for n, o in own))
        return state, controls._replace(
            sign_weight=controls.sign_weight * state.level,
            decay_scale=controls.decay_scale * (1.0 - (1.0 - self.decay) * (1.0 - state.level)),
        )

    def _advance(self, state: PlateauGuardState, loss: Any, xp: Any) -> PlateauGuardState:
        smoothed = filters.ema(state.loss, loss, self.loss_decay, debias=True)
        fell = smoothed.value < state.best - self.threshold * abs(state.best)
        better = fell | (smoothed.weight < YOUNG)
        count = xp.where(better, 0, filters.next_count(state.count, xp=xp))
        recovery = max(1, self.patience // 2) if self.recovery is None else self.recovery
        level = xp.clip(state.level + 1.0 / recovery, 0.0, 1.0)
        return PlateauGuardState(
            inner=state.inner,
            loss=smoothed,
            best=xp.where(better, smoothed.value, state.best),
            count=count,
            level=xp.where(count >= self.patience, 0.0, level),
        )
