"""What the control law decides each step, and how actuators read it.

Everything is a factor on the user's own value, so that schedules, parameter groups and a second
pair of betas keep their meaning. The few formulas that turn a factor into the value used stand
here, once, for every framework.
"""

from typing import Any, NamedTuple


class Controls(NamedTuple):
    """One step's orders; every field a float32 scalar, `ok` a boolean one.

    Attributes:
        meta_scale: slow factor on the learning rate; `stability_v1` leaves it at 1.
        phase_scale: fast factor on the learning rate; `stability_v2` leaves it at 1.
        beta1_factor: factor on the user's `b1`.
        beta1_min: lower bound of the result.
        beta1_max: upper bound of the result.
        beta2_gap: factor on `1 - b2`, the distance of the user's `b2` from 1.
        beta2_phase: factor on what that gives.
        beta2_shift: added after bounding (the emergency of `stability_v2`).
        beta2_min: lower bound of the result.
        beta2_max: upper bound of the result.
        clip_scale: factor on the gradient, at most 1.
        ok: whether the step counts. Where false the gradient is replaced by zero, both betas are 1
            and the rate is 0, so that nothing moves.
        phase: `phi`, the share of the fast window in both (WP 6); telemetry.
        curvature: `c_bar`, the smoothed loss slope (WP 5); telemetry.
        warning: `W`, the early-warning score in `[0, 1]` (v2.0 40-45); telemetry.
        clip_threshold: the norm above which `clip_scale` is below 1, infinite where the law does
            not clip; telemetry.
        alignment: the smoothed alignment of gradient and momentum; telemetry.
        sign_weight: factor in `[0, 1]` on the sign's part of a direction that blends a sign with
            something else; at 0 nothing of the sign is left. A law that moves this or the next has
            a true `steers_decay`.
        decay_scale: factor on the weight decay, at least 0.
        limit_factor: factor above 0 on the relative limits. A law that says this or one of the
            next has a true `needs_alignment`.
        run_phase: where a run is, an index into `RUN_PHASES`; telemetry.
        schedule_scale: the share of the highest rate so far that a schedule has left; telemetry.
        limit_scale: the share of the rate that the relative limit left any tensor; telemetry.
        limited_steps: for how many steps in a row that has been below 1; telemetry.
        momentum_ratio: `|m| / |g|`, large where gradients agree; telemetry.
        set_point: the alignment that is steered to; telemetry.
    """

    meta_scale: Any
    phase_scale: Any
    beta1_factor: Any
    beta1_min: Any
    beta1_max: Any
    beta2_gap: Any
    beta2_phase: Any
    beta2_shift: Any
    beta2_min: Any
    beta2_max: Any
    clip_scale: Any
    ok: Any
    phase: Any
    curvature: Any
    warning: Any
    clip_threshold: Any
    alignment: Any
    sign_weight: Any = 1.0
    decay_scale: Any = 1.0
    limit_factor: Any = 1.0
    run_phase: Any = 0.0
    schedule_scale: Any = 1.0
    limit_scale: Any = 1.0
    limited_steps: Any = 0.0
    momentum_ratio: Any = 0.0
    set_point: Any = 0.0


RUN_PHASES = ("search", "trunk", "cooldown", "end")
"""Where a run under `SelfDriving` is, by `Controls.run_phase`.

In the search the rate may still move by more than a tenth in one step, or the known first part of
the run lasts; in the trunk it follows what is sensed; in the cooldown it falls; at the end it is 0.
"""

SCHEDULE_SHARE = 0.8
"""The share of the highest rate that was set below which a schedule counts as falling."""

STEERED = ("sign_weight", "decay_scale")
"""What only a law with a true `steers_decay` orders."""

DRIVEN = (
    "limit_factor", "run_phase", "schedule_scale", "limit_scale", "limited_steps", "momentum_ratio",
    "set_point",
)  # fmt: skip
"""What only a law with a true `needs_alignment` says."""


def neutral(ok: Any, *, xp: Any) -> Controls:
    """The controls that change nothing: every factor 1, no bound, no clipping.

    A law starts from these and replaces what it steers.

    Args:
        ok: boolean scalar array, whether the step counts.
        xp: the array namespace.

    Returns:
        Controls under which an optimizer does what it would do without a controller.
    """
    one = xp.ones_like(ok, dtype=xp.float32)
    zero = xp.zeros_like(ok, dtype=xp.float32)
    return Controls(
        meta_scale=one,
        phase_scale=one,
        beta1_factor=one,
        beta1_min=zero,
        beta1_max=one,
        beta2_gap=one,
        beta2_phase=one,
        beta2_shift=zero,
        beta2_min=zero,
        beta2_max=one,
        clip_scale=one,
        ok=ok,
        phase=zero,
        curvature=zero,
        warning=zero,
        clip_threshold=one * float("inf"),
        alignment=zero,
        sign_weight=one,
        decay_scale=one,
        limit_factor=one,
        run_phase=zero,
        schedule_scale=one,
        limit_scale=one,
        limited_steps=zero,
        momentum_ratio=zero,
        set_point=zero,
    )


def betas(controls: Controls, b1: Any, b2: Any, *, xp: Any) -> tuple[Any, Any]:
    """The decay rates of this step, from the user's own.

    `beta1 = clip(b1 * beta1_factor)` (v2.0 17, 18) and
    `beta2 = clip((1 - (1 - b2) * beta2_gap) * beta2_phase) + beta2_shift`
    (v2.0 10; WP 10 and the fast loop). A base outside the law's bounds widens them to include it:
    the bounds limit the controller, not the user. A base of 0 means "no moment" and stays 0. On a
    skipped step both are exactly 1.

    Args:
        controls: this step's controls.
        b1: the user's decay rate of the first moment, in `[0, 1)`; a number or a scalar array.
        b2: the user's decay rate of the second moment, in `[0, 1)`.
        xp: the array namespace.

    Returns:
        `(beta1, beta2)`, float32 scalars in `[0, 1]`.
    """
    zero = xp.zeros_like(controls.beta1_factor)
    b1, b2 = b1 + zero, b2 + zero
    beta1 = _bounded(b1 * controls.beta1_factor, b1, controls.beta1_min, controls.beta1_max, xp)
    beta2 = (1.0 - (1.0 - b2) * controls.beta2_gap) * controls.beta2_phase
    beta2 = _bounded(beta2, b2, controls.beta2_min, controls.beta2_max, xp)
    beta2 = _bounded(beta2 + controls.beta2_shift, b2, controls.beta2_min, controls.beta2_max, xp)
    beta1 = xp.where(b1 > 0.0, beta1, zero)
    beta2 = xp.where(b2 > 0.0, beta2, zero)
    return xp.where(controls.ok, beta1, 1.0), xp.where(controls.ok, beta2, 1.0)


def _bounded(value: Any, base: Any, lower: Any, upper: Any, xp: Any) -> Any:
    """`value` held between the bounds, which give way to a base outside them."""
    return xp.clip(value, xp.minimum(lower, base), xp.maximum(upper, base))


def meta_learning_rate(
    controls: Controls,
    learning_rate: Any,
    bounds: tuple[float, float] | None = None,
    *,
    xp: Any,
) -> Any:
    """The user's learning rate times the slow factor (WP 9); 0 on a skipped step.

    Args:
        controls: this step's controls.
        learning_rate: the user's rate, of a schedule or constant; a number or a scalar array.
        bounds: absolute bounds on the product, `(lower, upper)`; `None` for none. The phase
            factor is applied after them.
        xp: the array namespace.

    Returns:
        A float32 scalar.
    """
    rate = learning_rate * controls.meta_scale
    if bounds is not None:
        rate = xp.clip(rate, bounds[0], bounds[1])
    return xp.where(controls.ok, rate, 0.0)


def clip_scale(threshold: Any, norm: Any, *, xp: Any) -> Any:
    """The factor of predictive clipping, `min(1, threshold / (norm + 1e-6))` (v2.0 24).

    Args:
        threshold: the largest norm, as `Controls.clip_threshold` has it; may be infinite.
        norm: of a gradient.
        xp: the array namespace.

    Returns:
        A scalar like the two, in `[0, 1]`; NaN where the norm is.
    """
    return xp.clip(threshold / (norm + 1e-6), 0.0, 1.0)


def falls(controls: Controls) -> Any:
    """Whether the rate falls to an end, or a schedule has lowered it below `SCHEDULE_SHARE`.

    It is false where the law has nothing to do with either.
    """
    if type(controls.run_phase) is float:  # left as it was; a scalar of NumPy is a float as well
        return False
    cooldown = float(RUN_PHASES.index("cooldown"))
    return (controls.run_phase >= cooldown) | (controls.schedule_scale < SCHEDULE_SHARE)
