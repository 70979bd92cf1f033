"""The signals of a step: norms of the raw gradient, its alignment with a first moment, the loss."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cruxy_control.signals import NOT_KNOWN, Signals, momentum_ratio
from cruxy_control.signals import alignment as cosine_of
from cruxy_optax._distributed.axes import inner_product, mean_over_axes, sum_over_shards
from cruxy_optax._low_bit import is_low_bit
from cruxy_optax._near_array import decoded_near
from cruxy_optax._sensors.power_sums import power_sums
from cruxy_optax._states import Moment
from cruxy_optax._tree import accumulator_dtype, check_real, root


def measure(
    updates: optax.Updates,
    value: Any,
    gamma: float,
    axis_names: Sequence[str] = (),
    replica_axes: Sequence[str] = (),
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
        replica_axes: those along which every device has gradients of its own, of whose sums the
            mean is taken.

    Returns:
        The signals, float32 scalars.
    """
    sums = raw_sums(updates, gamma, axis_names, replica_axes)
    return signals_of(sums, _loss(value, (*axis_names, *replica_axes)), gamma)


class RawSums(NamedTuple):
    """What the two norms are roots of; sums of parts add up to those of the whole."""

    squares: jax.Array  # sum of g^2; shape=()
    powers: jax.Array  # sum of |g|^gamma; shape=()


def raw_sums(
    updates: optax.Updates,
    gamma: float,
    axis_names: Sequence[str] = (),
    replica_axes: Sequence[str] = (),
) -> RawSums:
    """The sums over all leaves; the arguments are those of `measure`."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(updates)]
    check_real(leaves)
    sums = [power_sums(leaf, gamma) for leaf in leaves]
    return RawSums(
        squares=sum_over_shards([pair[0] for pair in sums], leaves, axis_names, replica_axes),
        powers=sum_over_shards([pair[1] for pair in sums], leaves, axis_names, replica_axes),
    )


def signals_of(sums: RawSums, loss: jax.Array, gamma: float) -> Signals:
    """The signals of sums and a float32 loss (WP 1)."""
    return Signals(
        grad_norm=root(sums.squares).astype(jnp.float32),
        gamma_norm=_gamma_root(sums.powers, gamma).astype(jnp.float32),
        loss=loss,
    )


def alignment(
    updates: optax.Updates,
    momenta: Sequence[Moment | None],
    norm: jax.Array,
    axis_names: Sequence[str] = (),
    replica_axes: Sequence[str] = (),
) -> tuple[jax.Array, jax.Array]:
    """How gradients and first moments agree, over all leaves that have one and moved.

    Args:
        updates: the raw gradients.
        momenta: one for each leaf of `updates`, `None` where it has none.
        norm: of all gradients.
        axis_names: see `measure`.
        replica_axes: likewise.

    Returns:
        Their cosine, and the ratio of their lengths: float32 scalars, `NOT_KNOWN` where one side is
        zero or something is not finite.
    """
    pairs = [
        (_if_moved(jnp.asarray(g), m.moved), _if_moved(_decoded(m.value), m.moved))
        for g, m in zip(jax.tree.leaves(updates), momenta, strict=True)
        if m is not None
    ]
    grads = [g for g, _ in pairs]
    if any(m is None or m.moved is not None for m in momenta):
        norm = root(raw_sums(grads, 2.0, axis_names, replica_axes).squares)

    axes = (axis_names, replica_axes)
    along = sum_over_shards([_product(g, m) for g, m in pairs], grads, *axes)
    length = sum_over_shards([_product(m, m) for _, m in pairs], grads, *axes)
    both = cosine_of(along, norm, length, xp=jnp), momentum_ratio(length, norm, xp=jnp)
    return both[0].astype(jnp.float32), both[1].astype(jnp.float32)


def excess(
    updates: optax.Updates,
    params: optax.Params,
    averages: Sequence[Any],
    axis_names: Sequence[str] = (),
    replica_axes: Sequence[str] = (),
) -> jax.Array:
    """`sum g (p - average)` over all leaves that have an average, see `Signals.excess`.

    Args:
        updates: the raw gradients.
        params: where they were taken.
        averages: one for each leaf, an array or a `NearArray`, `None` where it has none.
        axis_names: see `measure`.
        replica_axes: likewise.

    Returns:
        A float32 scalar.
    """
    leaves = zip(jax.tree.leaves(updates), jax.tree.leaves(params), averages, strict=True)
    rows = [(jnp.asarray(g), jnp.asarray(p), mean) for g, p, mean in leaves if mean is not None]
    ways = [p.astype(accumulator_dtype(p)) - decoded_near(mean, p) for _, p, mean in rows]
    grads = [g for g, _, _ in rows]
    sums = [_product(g, way) for g, way in zip(grads, ways, strict=True)]
    return sum_over_shards(sums, grads, axis_names, replica_axes).astype(jnp.float32)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = accumulator_dtype(a)
    return inner_product(a.astype(dtype), b.astype(dtype))


def _gamma_root(powers: jax.Array, gamma: float) -> jax.Array:
    none = powers == 0.0  # where the derivative of the power is infinite
    return jnp.where(none, powers, jnp.where(none, 1.0, powers) ** (1.0 / gamma))


def _decoded(moment: Any) -> jax.Array:
    return moment.decode() if is_low_bit(moment) else jnp.asarray(moment)


def _if_moved(x: jax.Array, moved: jax.Array | None) -> jax.Array:
    return x if moved is None else jnp.where(moved, x, jnp.zeros_like(x))


def _loss(value: Any, axis_names: Sequence[str]) -> jax.Array:
    if value is None:
        return jnp.full((), NOT_KNOWN, jnp.float32)
    loss = jnp.asarray(value)
    if loss.shape != () or jnp.iscomplexobj(loss):
        raise ValueError(
            f"value must be the loss, a real scalar, got shape {loss.shape} and dtype "
            f"{loss.dtype}; pass its mean, or leave it out."
        )
    return mean_over_axes(loss.astype(jnp.float32), axis_names)
