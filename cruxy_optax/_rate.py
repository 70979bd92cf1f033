"""The two factors of the learning rate: the phase throttle and the meta learning rate."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cruxy_control.checks import check_bounds, check_range
from cruxy_control.controls import Controls, meta_learning_rate
from cruxy_optax._controls import require_controls


class ThrottleByPhaseState(NamedTuple):
    """The factor last applied, for telemetry."""

    phase_scale: jax.Array  # shape=(), dtype=float32


def throttle_by_phase() -> optax.GradientTransformationExtraArgs:
    """Slows the step while the gradient norm rises: the fast factor of the rate (WP 7).

    Under `Meta3` the factor is `1 - phase_strength * phi`, 0.75 on a steady gradient; under
    `StabilityV1` it follows v2.0 9; `StabilityV2` leaves it at 1.

    Returns:
        An `optax.GradientTransformationExtraArgs`, for use inside `stabilize`.

    Raises:
        ValueError: from `update` outside `stabilize`.
    """

    def init_fn(params: optax.Params) -> ThrottleByPhaseState:
        del params
        return ThrottleByPhaseState(jnp.ones((), jnp.float32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        controls: Controls | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ThrottleByPhaseState]:
        del state, params, extra_args
        scale = require_controls(controls, "throttle_by_phase").phase_scale
        return jax.tree.map(lambda u: u * scale, updates), ThrottleByPhaseState(scale)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class ScaleByMetaLearningRateState(NamedTuple):
    """The schedule's position and the rate last applied."""

    count: jax.Array  # good steps so far; shape=(), dtype=int32
    learning_rate: jax.Array  # 0 on a skipped step; shape=(), dtype=float32


def scale_by_meta_learning_rate(
    learning_rate: optax.ScalarOrSchedule,
    *,
    bounds: tuple[float, float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies by minus the user's rate times the controller's slow factor (WP 9, 13).

    Args:
        learning_rate: a constant of at least 0, or a schedule of the number of good steps: a
            skipped step does not advance it.
        bounds: absolute bounds `(lower, upper)` on the product, `None` for none. They change what
            was asked for; `cruxy` 2.1.0 has (1e-7, 1e-2).

    Returns:
        An `optax.GradientTransformationExtraArgs`, for use inside `stabilize`.

    Raises:
        ValueError: where an argument is outside its range; from `update` outside `stabilize`.
    """
    if not callable(learning_rate):
        remedy = "use about 1e-3 for Adam, 1e-4 for Lion, or a schedule"
        learning_rate = check_range("learning_rate", learning_rate, 0.0, remedy=remedy)
    if bounds is not None:
        bounds = check_bounds(
            "bounds", bounds, 0.0, float("inf"), remedy="use (1e-7, 1e-2) or None"
        )

    def init_fn(params: optax.Params) -> ScaleByMetaLearningRateState:
        del params
        return ScaleByMetaLearningRateState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        controls: Controls | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByMetaLearningRateState]:
        del params, extra_args
        controls = require_controls(controls, "scale_by_meta_learning_rate")
        base = learning_rate(state.count) if callable(learning_rate) else learning_rate
        rate = meta_learning_rate(controls, jnp.asarray(base, jnp.float32), bounds, xp=jnp)
        counted = jnp.where(controls.ok, optax.safe_increment(state.count), state.count)
        state = ScaleByMetaLearningRateState(counted, rate)
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
