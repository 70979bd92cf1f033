"""The sensors: what is measured of a raw gradient, and two observers for a user's own chain."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from cruxy_control import filters
from cruxy_control.checks import check_range
from cruxy_control.signals import Signals
from cruxy_control.signals import alignment as cosine_of
from cruxy_optax._low_bit import is_low_bit
from cruxy_optax._sensors.power_sums import accumulator_dtype, power_sums


def measure(
    updates: optax.Updates, value: Any, gamma: float, axis_names: Sequence[str] = ()
) -> Signals:
    """The signals of one step (WP 1), from gradients that nothing has touched yet.

    Sums accumulate in float32, in float64 where a leaf is float64; the norms are float32. With
    `axis_names` the sums are taken over all shards of leaves that are split along those axes,
    and the loss is averaged over them.

    Args:
        updates: the raw gradients.
        value: the step's loss, a scalar, or `None`.
        gamma: exponent of the gamma norm; 2 costs no second pass.
        axis_names: axes of an enclosing `jax.shard_map` or `jax.pmap`.

    Returns:
        The signals, float32 scalars.
    """
    return signals_of(raw_sums(updates, gamma, axis_names), _loss(value, axis_names), gamma)


class RawSums(NamedTuple):
    """What the two norms are roots of; sums of parts add up to those of the whole."""

    squares: jax.Array  # sum of g^2; shape=()
    powers: jax.Array  # sum of |g|^gamma; shape=()


def raw_sums(updates: optax.Updates, gamma: float, axis_names: Sequence[str] = ()) -> RawSums:
    """The sums over all leaves; the arguments are those of `measure`."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(updates)]
    check_real(leaves)
    sums = [power_sums(leaf, gamma) for leaf in leaves]
    return RawSums(
        squares=_total([pair[0] for pair in sums], leaves, axis_names),
        powers=_total([pair[1] for pair in sums], leaves, axis_names),
    )


def signals_of(sums: RawSums, loss: jax.Array, gamma: float) -> Signals:
    """The signals of sums and a float32 loss (WP 1)."""
    return Signals(
        grad_norm=jnp.sqrt(sums.squares).astype(jnp.float32),
        gamma_norm=(sums.powers ** (1.0 / gamma)).astype(jnp.float32),
        loss=loss,
    )


def alignment(
    updates: optax.Updates, momenta: Sequence[Any], norm: jax.Array, axis_names: Sequence[str] = ()
) -> jax.Array:
    """The cosine between gradients and first moments, over all leaves that have one.

    Args:
        updates: the raw gradients.
        momenta: one for each leaf of `updates`, `None` where it has none, coded or not.
        norm: of all gradients.
        axis_names: see `measure`.

    Returns:
        A float32 scalar, NaN where one side is zero or something is not finite.
    """
    pairs = [
        (jnp.asarray(g), m.decode() if is_low_bit(m) else m)
        for g, m in zip(jax.tree.leaves(updates), momenta, strict=True)
        if m is not None
    ]
    grads = [g for g, _ in pairs]
    if len(grads) < len(momenta):
        norm = jnp.sqrt(raw_sums(grads, 2.0, axis_names).squares)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        dtype = accumulator_dtype(a)
        return jnp.vdot(a.astype(dtype), b.astype(dtype))

    along = _total([product(g, m) for g, m in pairs], grads, axis_names)
    length = _total([product(m, m) for _, m in pairs], grads, axis_names)
    return cosine_of(along, norm, length, xp=jnp).astype(jnp.float32)


def as_axes(axis_names: str | Sequence[str]) -> tuple[str, ...]:
    """Names of mesh axes as a tuple; one may come as a string."""
    return (axis_names,) if isinstance(axis_names, str) else tuple(axis_names)


def mean_square(leaf: jax.Array, axis_names: Sequence[str] = ()) -> jax.Array:
    """The mean of the squares of a leaf, over all its shards; float32, 0 of an empty leaf."""
    wide = leaf.astype(accumulator_dtype(leaf))
    square = jnp.vdot(wide, wide).astype(jnp.float32) / max(1, leaf.size)
    split = [axis for axis in axis_names if axis in _split_axes(leaf)]
    return lax.pmean(square, split) if split else square


def whole_mean_square(
    squares: Sequence[jax.Array], leaves: Sequence[jax.Array], axis_names: Sequence[str] = ()
) -> jax.Array:
    """The mean of the squares of all elements of all leaves, from each leaf's `mean_square`."""
    counts = [
        leaf.size * math.prod(lax.psum(1, a) for a in axis_names if a in _split_axes(leaf))
        for leaf in leaves
    ]
    total = max(1, sum(counts))
    shares = [square * (n / total) for square, n in zip(squares, counts, strict=True)]
    return sum(shares, jnp.zeros((), jnp.float32))


def check_real(leaves: Sequence[Any]) -> None:
    """Raises `TypeError` where a leaf is complex: the law's norms and signs are for real numbers.

    Raises:
        TypeError: with the rule, the dtype received and the remedy.
    """
    for leaf in leaves:
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"parameters and gradients must be real, got {jnp.asarray(leaf).dtype}; optimize "
                "the real and imaginary part as two leaves, as "
                "optax.contrib.split_real_and_imaginary does."
            )


def _total(
    sums: Sequence[jax.Array], leaves: Sequence[jax.Array], axis_names: Sequence[str]
) -> jax.Array:
    total = jnp.zeros((), jnp.float32)
    for partial, leaf in zip(sums, leaves, strict=True):
        split = _split_axes(leaf)
        for axis in axis_names:
            # A leaf that varies along the axis is a shard of a parameter; one that does not is a
            # copy, and the mean of equal copies is that copy.
            partial = lax.psum(partial, axis) if axis in split else lax.pmean(partial, axis)
        total = total + partial
    return total


def _split_axes(leaf: jax.Array) -> frozenset[str]:
    """The `shard_map` axes along which devices hold different values of the leaf."""
    kind = jax.typeof(leaf)
    if hasattr(kind, "manual_axis_type"):
        return kind.manual_axis_type.varying
    return getattr(kind, "vma", frozenset())  # the name before jax 0.10


def _loss(value: Any, axis_names: Sequence[str]) -> jax.Array:
    if value is None:
        return jnp.full((), jnp.nan, jnp.float32)
    loss = jnp.asarray(value)
    if loss.shape != () or jnp.iscomplexobj(loss):
        raise ValueError(
            f"value must be the loss, a real scalar, got shape {loss.shape} and dtype "
            f"{loss.dtype}; pass its mean, or leave it out."
        )
    loss = loss.astype(jnp.float32)
    return lax.pmean(loss, tuple(axis_names)) if axis_names else loss


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

    Example:
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

    Example:
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
