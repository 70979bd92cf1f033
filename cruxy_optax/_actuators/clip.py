"""Clipping by a threshold that the control law predicts from the past norms."""

from typing import Any

import jax
import optax

from cruxy_control.controls import Controls
from cruxy_optax._controls import require_controls


def clip_by_predicted_norm() -> optax.GradientTransformationExtraArgs:
    """Scales the gradient down to the norm that the controller expects (v2.0 24).

    `g <- g * min(1, threshold / (|g| + 1e-6))` with
    `threshold = theta (1 + 0.5 sqrt(v_fast / v_slow))`, `theta` the law's `clip_threshold`. The
    factor is one of the controls, so clipping costs no reduction of its own. What comes out is
    float32 for half-precision gradients.

    Returns:
        An `optax.GradientTransformationExtraArgs` without state, for use inside `stabilize`.

    Raises:
        ValueError: from `update` outside `stabilize`.
    """

    def init_fn(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        controls: Controls | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params, extra_args
        scale = require_controls(controls, "clip_by_predicted_norm").clip_scale
        return jax.tree.map(lambda g: g * scale, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
