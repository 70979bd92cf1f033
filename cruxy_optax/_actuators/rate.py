"""The two factors of the learning rate: the phase throttle and the meta learning rate."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cruxy_control.checks import check_bounds, check_range
from cruxy_control.controls import Controls, meta_learning_rate
from cruxy_control.formulas.limits import (
    LIMIT_WIDTH,
    RELATIVE_FLOOR,
    rate_share,
    width_of,
    width_share,
)
from cruxy_control.formulas.limits import relative_limit as limit_of
from cruxy_optax._controls import materialize, require_controls
from cruxy_optax._distributed.axes import as_axes, is_spread, mean_square, whole_mean_square
from cruxy_optax._tree import root

MANY = 16
"""Tensors above which their sum is kept: XLA adds it up again in the loop of each, which is no work
for a few, and for many makes the program grow with the square of their number."""


class ThrottleByPhaseState(NamedTuple):
    """The factor last applied, for telemetry."""

    phase_scale: jax.Array  # shape=(), dtype=float32

    held_by_controls = True

    @property
    def rate_factor(self) -> jax.Array:
        """What telemetry counts into the learning rate."""
        return self.phase_scale


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
    applied_rate: jax.Array  # 0 on a skipped step; shape=(), dtype=float32
    limit_scale: jax.Array  # largest share of it that a tensor got, 0 of 0; shape=(), float32
    base_rate: jax.Array  # the user's, before the law's factor; shape=(), dtype=float32

    held_by_controls = True
    telemetry = ("learning_rate",)

    @property
    def learning_rate(self) -> jax.Array:
        """What telemetry shows. No field: `inject_hyperparams` has one of this name to set."""
        return self.applied_rate


def scale_by_meta_learning_rate(
    learning_rate: optax.ScalarOrSchedule,
    *,
    bounds: tuple[float, float] | None = None,
    relative_limit: chex.Numeric | None = None,
    relative_floor: chex.Numeric = RELATIVE_FLOOR,
    limit_width: chex.Numeric | None = LIMIT_WIDTH,
    axis_names: str | Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Multiplies by minus the user's rate times the controller's slow factor (WP 9, 13).

    Args:
        learning_rate: a constant of at least 0, or a schedule of the number of good steps: a
            skipped step does not advance it.
        bounds: absolute bounds `(lower, upper)` on the product, `None` for none. They change what
            was asked for; `cruxy` 2.1.0 has (1e-7, 1e-2).
        relative_limit: no tensor gets a rate above this share of its own root mean square, or of
            that of all parameters in the tree where that is smaller, so that no step of a direction
            of size 1 moves it further; above 0, `None` for no limit. What comes before it in the
            chain should be a direction of about that size, such as Adam's or Lion's.
        relative_floor: the root mean square of a tensor counts as at least this, above 0; 0.01 by
            default.
        limit_width: of a tensor that is wider than this the limit is multiplied by the root of
            `limit_width` over its width, above 0; 64 by default, `None` for no such fall. The width
            of a matrix is its smaller side, and of a tensor that of the matrix its axes make, such
            as all but the last of a convolution's against the last. What Adam and Lion change in a
            matrix can grow with its width, and the matrix with the root of it. Inside
            `jax.shard_map` the width is that of the part that a device has, and a stack of matrices
            may count as wider than one of them. Give `None` behind orthogonal directions.
        axis_names: axes of an enclosing `jax.shard_map` over which parameters may be split.

    Returns:
        An `optax.GradientTransformationExtraArgs`, for use inside `stabilize`.

    Raises:
        ValueError: where an argument is outside its range; from `update` outside `stabilize`, or
            where a relative limit finds no `params`.

    References:
        The scale of `relative_limit` is that of Adafactor's relative step, section 8 of Shazeer and
        Stern, [Adafactor](https://arxiv.org/abs/1804.04235), 2018.
    """
    if not callable(learning_rate):
        remedy = "use about 1e-3 for Adam, 1e-4 for Lion, or a schedule"
        learning_rate = check_range("learning_rate", learning_rate, 0.0, remedy=remedy)
    if bounds is not None:
        bounds = check_bounds(
            "bounds", bounds, 0.0, float("inf"), remedy="use (1e-7, 1e-2) or None"
        )

    if relative_limit is not None:
        remedy = "use 0.1 for Adam, 0.01 for Lion, or None for no limit"
        relative_limit = check_range(
            "relative_limit", relative_limit, 0.0, lower_open=True, remedy=remedy
        )
    relative_floor = check_range(
        "relative_floor", relative_floor, 0.0, lower_open=True, remedy="keep the default"
    )
    if limit_width is not None:
        limit_width = check_range(
            "limit_width", limit_width, 0.0, lower_open=True, remedy="use 64 or None"
        )
    axis_names = as_axes(axis_names)

    def init_fn(params: optax.Params) -> ScaleByMetaLearningRateState:
        del params
        zero, one = jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)
        return ScaleByMetaLearningRateState(jnp.zeros((), jnp.int32), zero, one, zero)

    def limited(
        rate: jax.Array, share: chex.Numeric, params: optax.Params | None
    ) -> tuple[optax.Params, jax.Array]:
        """The rate of every leaf, at most this share of its size; and the largest of them."""
        if params is None:
            raise ValueError(
                "a relative limit measures the parameters, but got params=None; call "
                "update(grads, state, params)."
            )

        leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, params))
        squares = [mean_square(p, axis_names) for p in leaves]
        whole = whole_mean_square(squares, leaves, axis_names)
        if len(leaves) > MANY and whole.dtype == jnp.float32:
            (whole,) = materialize(whole)

        widths = [width_of(p.shape) for p in leaves]
        narrow = {width_of(p.shape): width_share(p.shape, limit_width) for p in leaves}

        def one(square: jax.typing.ArrayLike, own: Any = None) -> jax.Array:
            square = jnp.asarray(square, jnp.float32)
            return limit_of(square, share, relative_floor, xp=jnp, whole=whole, share=own)

        if not any(map(is_spread, leaves)):
            pairs = zip(squares, widths, strict=True)
            limits = [jnp.minimum(rate, one(square, narrow[w])) for square, w in pairs]
            return treedef.unflatten(limits), jnp.stack([jnp.zeros_like(rate), *limits]).max()

        # A limit rises with the size of its tensor. So both ends are worked out once for all, and
        # few operations a tensor are left to compile.
        scale, lowest, highest = materialize(share, one(0.0), one(float("inf")))

        def between(square: jax.Array, width: int) -> jax.Array:
            limit = jnp.minimum(jnp.maximum(scale * root(square), lowest), highest)
            return jnp.minimum(rate, limit * narrow[width])

        # Of one width the largest tensor has the largest rate: not every one is worked out again.
        of_width: dict[int, list[jax.Array]] = {width: [] for width in narrow}
        for square, width in zip(squares, widths, strict=True):
            of_width[width].append(square)
        largest = [between(jnp.stack(own).max(), width) for width, own in of_width.items()]
        limits = [between(*pair) for pair in zip(squares, widths, strict=True)]
        return treedef.unflatten(limits), jnp.stack(largest).max()

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        controls: Controls | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByMetaLearningRateState]:
        del extra_args
        controls = require_controls(controls, "scale_by_meta_learning_rate")
        base = learning_rate(state.count) if callable(learning_rate) else learning_rate
        base = jnp.asarray(base, jnp.float32)
        rate = meta_learning_rate(controls, base, bounds, xp=jnp)
        counted = jnp.where(controls.ok, optax.safe_increment(state.count), state.count)
        largest = None
        if relative_limit is None:
            scaled = jax.tree.map(lambda u: -rate * u, updates)
        else:
            rates, largest = limited(rate, relative_limit * controls.limit_factor, params)
            scaled = jax.tree.map(lambda u, r: -r * u, updates, rates)
        share = rate_share(largest, rate, xp=jnp)
        share = jnp.where(controls.ok, share, state.limit_scale)
        base = jnp.where(controls.ok, base, state.base_rate)
        return scaled, ScaleByMetaLearningRateState(counted, rate, share, base)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
