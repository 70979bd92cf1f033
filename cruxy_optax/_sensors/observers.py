"""Observers for any chain: they measure what the controller would, and change nothing."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cruxy_control import filters
from cruxy_control.checks import check_range
from cruxy_optax._sensors.measure import measure
from cruxy_optax._tree import check_real


class TrackGammaNormState(NamedTuple):
    """What `track_gamma_norm` has measured; zero and empty before the first step."""

    gamma_norm: jax.Array  # shape=(), dtype=float32
    phase: jax.Array  # shape=(), dtype=float32
    windows: filters.Windows  # scalars, float32


def track_gamma_norm(
    gamma: float = 1.5,
    fast_decay: float = 0.9,
    slow_decay: float = 0.999,
) -> optax.GradientTransformationExtraArgs:
    r"""Observes the gamma norm of what passes, with its fast and slow average; changes nothing.

    `sigma = (sum |g|^gamma)^(1/gamma)` (WP 1), `v_fast` and `v_slow` its bias-corrected
    exponential averages (WP 2, 3), `phi = v_fast / (v_fast + v_slow)` (WP 6). The values are in
    the state: `optax.tree.get(opt_state, "phase")`. A step whose norm is not finite is left out of
    the averages.

    Args:
        gamma: exponent of the norm, at least 1.
        fast_decay: decay of `v_fast`, in `[0, 1)`.
        slow_decay: decay of `v_slow`, in `[0, 1)`.

    Returns:
        An `optax.GradientTransformationExtraArgs` that returns updates as they came.

    Raises:
        ValueError: where an argument is outside its range.

    Examples:
        >>> import jax.numpy as jnp, optax, cruxy_optax
        >>> tx = optax.chain(cruxy_optax.track_gamma_norm(gamma=2.0), optax.sgd(0.1))
        >>> params = {"w": jnp.zeros(2)}
        >>> state = tx.init(params)
        >>> _, state = tx.update({"w": jnp.array([3.0, 4.0])}, state, params)
        >>> print(optax.tree.get(state, "gamma_norm"), optax.tree.get(state, "phase"))
        5.0 0.5
    """
    check_range("gamma", gamma, 1.0, remedy="1.5 is the paper's, 2 the Euclidean norm")
    check_range("fast_decay", fast_decay, 0.0, 1.0, upper_open=True, remedy="use 0.9")
    check_range("slow_decay", slow_decay, 0.0, 1.0, upper_open=True, remedy="use 0.999")

    def init_fn(params: optax.Params) -> TrackGammaNormState:
        check_real(jax.tree.leaves(params))
        zero = jnp.zeros((), jnp.float32)
        return TrackGammaNormState(zero, zero, filters.empty_windows(zero, xp=jnp))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TrackGammaNormState]:
        del params, extra_args
        sigma = measure(updates, None, gamma).gamma_norm
        moved = filters.windows(
            state.windows,
            sigma,
            fast_decay=fast_decay,
            slow_decay=slow_decay,
            debias=True,
            outlier_cap=None,
            xp=jnp,
        )
        windows = filters.select(jnp.isfinite(sigma), moved, state.windows, xp=jnp)
        phase = filters.phase(windows.fast.value, windows.slow.value)
        return updates, TrackGammaNormState(sigma, phase, windows)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class TrackCurvatureState(NamedTuple):
    """What `track_curvature` has measured."""

    curvature: jax.Array  # shape=(), dtype=float32
    slope: filters.Curvature  # scalars, float32; pairs int32


def track_curvature(decay: float = 0.95) -> optax.GradientTransformationExtraArgs:
    """Observes how the loss moves for the gradient it had; changes nothing.

    `c = (L_t - L_{t-1}) / (|g_{t-1}| + eps)` (WP 4), clipped to `[-1, 1]` and averaged (WP 5). It
    is in the state: `optax.tree.get(opt_state, "curvature")`. The loss comes as
    `tx.update(grads, state, params, value=loss)`; a step without a finite loss or gradient holds
    the average.

    Args:
        decay: decay of the average, in `[0, 1)`.

    Returns:
        An `optax.GradientTransformationExtraArgs` that returns updates as they came.

    Raises:
        ValueError: where `decay` is outside its range.

    Examples:
        >>> import jax.numpy as jnp, optax, cruxy_optax
        >>> tx = optax.chain(cruxy_optax.track_curvature(), optax.sgd(0.1))
        >>> params = jnp.array(1.0)
        >>> state = tx.init(params)
        >>> for loss in (2.0, 1.5):
        ...     _, state = tx.update(jnp.array(1.0), state, params, value=loss)
        >>> print(optax.tree.get(state, "curvature"))
        -0.025
    """
    check_range("decay", decay, 0.0, 1.0, upper_open=True, remedy="0.95 is the paper's")

    def init_fn(params: optax.Params) -> TrackCurvatureState:
        check_real(jax.tree.leaves(params))
        zero = jnp.zeros((), jnp.float32)
        return TrackCurvatureState(zero, filters.empty_curvature(zero, xp=jnp))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value: chex.Numeric | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TrackCurvatureState]:
        del params, extra_args
        signals = measure(updates, value, gamma=2.0)
        moved = filters.curvature(
            state.slope,
            signals.loss,
            signals.grad_norm,
            decay=decay,
            limit=1.0,
            hold_missing=True,
            xp=jnp,
        )
        slope = filters.select(jnp.isfinite(signals.grad_norm), moved, state.slope, xp=jnp)
        return updates, TrackCurvatureState(slope.value, slope)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
