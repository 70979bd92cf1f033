"""AXIOM's direction: a gradient over the root of its factored second moment, and its average."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cruxy_control.checks import check_count, check_range
from cruxy_control.formulas.factored import (
    BOOST_LIMIT,
    factored_axes,
    inverse_power,
    second_moment_decay,
    snr_factor,
    streak_factor,
)
from cruxy_control.formulas.trust import rms_clip_scale
from cruxy_optax._distributed.axes import after, is_spread, mean_square, together
from cruxy_optax._memory.quantize import check_bits, in_bits
from cruxy_optax._tree import accumulator_dtype, root


def scale_by_factored_rms(
    decay_rate: Any, min_dim: int, power: Any = 1.0
) -> optax.GradientTransformation:
    """optax's, with float32 means whatever the parameters: in bfloat16 they would stop moving.

    Args:
        decay_rate: the exponent in the decay of the second moment, in `(0, 1]`.
        min_dim: a tensor whose two largest axes are at least this long is factored.
        power: of the root that the gradient is divided by, in `[0, 1]`; see `inverse_power`.

    Raises:
        ValueError: where one of them is outside its range.
    """
    decay_rate = check_range(
        "decay_rate", decay_rate, 0.0, 1.0, lower_open=True, remedy="0.8 is Adafactor's"
    )
    remedy = "32 factors nearly every matrix"
    min_dim = check_count("min_dim_size_to_factor", min_dim, 2, remedy=remedy)
    remedy = "1 is Adafactor's, 0 no preconditioner"
    power = check_range("power", power, 0.0, 1.0, remedy=remedy)
    factored = optax.scale_by_factored_rms(
        decay_rate=decay_rate,
        min_dim_size_to_factor=min_dim,
        decay_rate_fn=lambda step, exponent: second_moment_decay(step, exponent, xp=jnp),
    )

    def init_fn(params: optax.Params) -> optax.OptState:
        return factored.init(jax.tree.map(_accumulator_like, params))

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params  # of which only shapes would be read
        grads = jax.tree.map(lambda g: g.astype(accumulator_dtype(g)), updates)
        directions, state = factored.update(grads, state, grads)
        leaves, treedef = jax.tree.flatten(grads)
        plain = isinstance(power, float) and power == 1.0
        if plain and not any(map(is_spread, leaves)):
            return directions, state
        moments: Any = state
        fields = (moments.v_row, moments.v_col, moments.v)
        factors = [
            Factors.of(g, row, column, whole, min_dim)
            for g, row, column, whole in zip(
                leaves, *map(treedef.flatten_up_to, fields), strict=True
            )
        ]
        one = after([size for own in factors for size in own.sizes], leaves)
        return treedef.unflatten(
            [divided(g, own, one) for g, own in zip(leaves, factors, strict=True)]
        ), state

    def inverse(v: jax.Array) -> jax.Array:
        # XLA's own root is the nearest to optax's.
        plain = isinstance(power, float) and power == 1.0
        return v**-0.5 if plain else inverse_power(v, power, xp=jnp)

    def divided(g: jax.Array, own: "Factors", one: jax.Array | None) -> jax.Array:
        """The gradient over as much of the root as `power` says."""
        if own.means is None:
            return g * inverse(own.rows)
        # Each by itself: the derivative of a quotient squares the smallest of means.
        rows, means, columns = map(inverse, (own.rows, own.means, own.columns))
        rows = rows / means
        return g * (rows if one is None else rows * one.astype(rows.dtype)) * columns

    return optax.GradientTransformation(init_fn, update_fn)


class Factors(NamedTuple):
    """What a gradient is divided by: two means and the mean of the first, or a whole moment.

    Attributes:
        rows: over the largest axis, which has one element; or the whole second moment.
        columns: over the second largest axis; `None` where the moment is whole.
        means: of `rows` over the second largest axis.
        sizes: scalars of which each waits for one of the two means.
    """

    rows: jax.Array
    columns: Any = None
    means: Any = None
    sizes: tuple[jax.Array, ...] = ()

    @classmethod
    def of(cls, g: jax.Array, row: Any, column: Any, whole: Any, min_dim: int) -> "Factors":
        """Those of a gradient, from what optax keeps for it."""
        axes = factored_axes(g.shape, min_dim)
        if axes is None:
            return cls(whole)
        second, first = axes
        rows, columns = jnp.expand_dims(row, first), jnp.expand_dims(column, second)
        means = jnp.mean(rows, axis=second, keepdims=True)
        return cls(rows, columns, means, (jnp.sum(means), jnp.sum(columns)))


def _accumulator_like(p: Any) -> Any:
    """A parameter itself, so that its sharding is kept, or its shape in the accumulator's dtype."""
    dtype = accumulator_dtype(p)
    return p if jnp.result_type(p) == dtype else jax.ShapeDtypeStruct(jnp.shape(p), dtype)


def limited_rms(clip_rms: float | None) -> list[optax.GradientTransformation]:
    """A limit on the root mean square of each tensor's direction; none where it is `None`.

    Raises:
        ValueError: where it is not above 0.
    """
    if clip_rms is None:
        return []
    remedy = "1 is Adafactor's, None switches it off"
    limit = check_range("clip_rms", clip_rms, 0.0, lower_open=True, remedy=remedy)
    of_optax = optax.clip_by_block_rms(limit)

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        leaves, treedef = jax.tree.flatten(updates)
        if not any(map(is_spread, leaves)):
            return of_optax.update(updates, state, params)
        sizes = [root(mean_square(u)) for u in leaves]
        scales = together([rms_clip_scale(rms, limit, xp=jnp) for rms in sizes], leaves)
        return treedef.unflatten([u * s for u, s in zip(leaves, scales, strict=True)]), state

    return [optax.GradientTransformation(of_optax.init, update_fn)]


def scale_by_size(smallest: float = 1e-3) -> optax.GradientTransformation:
    """`optax.scale_by_param_block_rms` whose sums over shards are all packed.

    Args:
        smallest: the root mean square of a tensor counts as at least this.
    """
    of_optax = optax.scale_by_param_block_rms(smallest)

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError(
                "relative_step measures the parameters, but got params=None; call "
                "update(grads, state, params)."
            )
        leaves, treedef = jax.tree.flatten(updates)
        weights = list(map(jnp.asarray, treedef.flatten_up_to(params)))
        if not any(map(is_spread, weights)):
            return of_optax.update(updates, state, params)
        sizes = together([jnp.maximum(root(mean_square(p)), smallest) for p in weights], weights)
        return treedef.unflatten([u * s for u, s in zip(leaves, sizes, strict=True)]), state

    return optax.GradientTransformation(of_optax.init, update_fn)


def momentum_of_directions(
    b1: float | None, bits: int, streak_boost: float, snr_floor: float
) -> list[optax.GradientTransformation]:
    """An average of what comes, in so many bits, and what is made of it; none without `b1`.

    Args:
        b1: decay of the average, in `(0, 1)`; `None` for none.
        bits: an element, 32, 16, 8 or 4.
        streak_boost: see `streak_factor`; 1 for none.
        snr_floor: see `snr_factor`; 0 for none.

    Raises:
        ValueError: where one of them is outside its range, or something reads an average that
            there is not.
    """
    remedy = "1 switches it off, 1.5 is the most"
    boost = check_range("streak_boost", streak_boost, 1.0, BOOST_LIMIT, remedy=remedy)
    remedy = "0 switches it off, 0.1 is twice what noise has at b1=0.9"
    floor = check_range("snr_floor", snr_floor, 0.0, 1.0, upper_open=True, remedy=remedy)
    bits = check_bits("momentum_bits", bits)
    if b1 is None:
        for name, value, off in (("streak_boost", boost, 1.0), ("snr_floor", floor, 0.0)):
            if value != off:
                raise ValueError(
                    f"{name} needs a momentum to read, got {name}={value:g} without b1; give "
                    f"b1=0.9, or {name}={off:g}."
                )
        return []
    remedy = "0.9 is a usual value, None is no momentum"
    decay: Any = check_range("b1", b1, 0.0, 1.0, lower_open=True, upper_open=True, remedy=remedy)
    average = in_bits(bits, None, lambda dtype: optax.ema(decay, True, dtype), "momentum_bits")

    def weighed(m: Any, _: Any) -> jax.Array:
        factor = streak_factor(m, boost, xp=jnp) if boost != 1.0 else 1.0
        if floor != 0.0:
            factor = factor * snr_factor(_row_means(m * m), floor, xp=jnp)
        return m * factor

    if boost == 1.0 and floor == 0.0:
        return [average]
    return [average, optax.stateless_with_tree_map(weighed)]


def _row_means(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=-1, keepdims=True) if x.ndim else x
