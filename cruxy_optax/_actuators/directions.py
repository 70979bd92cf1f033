"""Directions between Lion's sign and a normalised momentum, behind any momentum."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cruxy_control.checks import check_range
from cruxy_control.controls import Controls
from cruxy_control.formulas import directions as formulas
from cruxy_optax._distributed.axes import as_axes, mean_square, together
from cruxy_optax._tree import accumulator_dtype, root


def soften_sign(
    temperature: chex.Numeric = 1.0, *, axis_names: str | Sequence[str] = ()
) -> optax.GradientTransformationExtraArgs:
    r"""A sign that is soft below the tensor's own root mean square.

    $$
    u = \frac{(1 + \tau)\, c}{|c| + \tau\, \mathrm{rms}(c)}
    $$

    At $\tau = 0$ it is $\mathrm{sign}(c)$, to the bit; as $\tau$ grows, $c / \mathrm{rms}(c)$. An
    element as large as the root mean square has size 1 at every temperature, and gradients a
    thousand times as large change nothing. It stands behind a momentum, such as
    `scale_by_controlled_momentum`; with that and `temperature=0` it is Lion.
    `python -m benchmarks components` measures what a temperature is worth.

    Args:
        temperature: $\tau$, at least 0.
        axis_names: axes of an enclosing `jax.shard_map` over which parameters may be split.

    Returns:
        An `optax.GradientTransformationExtraArgs` without state. It takes what comes as a whole
        tensor each, so that a stack of layers has one root mean square. What comes out is float32
        for half precision.

    Raises:
        ValueError: where `temperature` is outside its range.

    Examples:
        >>> import jax.numpy as jnp, cruxy_optax
        >>> tx = cruxy_optax.soften_sign(temperature=1.0)
        >>> momentum = jnp.array([7.0, 1.0, 0.0, -1.0, -7.0])
        >>> print(tx.update(momentum, tx.init(momentum))[0].round(2))
        [ 1.22  0.37  0.   -0.37 -1.22]

    References:
        A case of Lion-K: Chen et al., [Lion Secretly Solves Constrained
        Optimization](https://arxiv.org/abs/2310.05898), 2023.
    """
    temperature, axes = checked_temperature(temperature), as_axes(axis_names)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params, extra_args
        leaves, treedef = jax.tree.flatten(updates)
        softened = [
            formulas.soften_sign(c, temperature, rms, xp=jnp) for c, rms in sized(leaves, axes)
        ]
        return treedef.unflatten(softened), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


class BlendSignState(NamedTuple):
    """Where a schedule of the weight stands."""

    count: jax.Array  # good steps so far; shape=(), dtype=int32


def blend_sign(
    weight: optax.ScalarOrSchedule = formulas.BLEND,
    temperature: chex.Numeric = 1.0,
    *,
    axis_names: str | Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    r"""A soft sign, and a share of the momentum itself at a root mean square of 1.

    $$
    u = (1 - w)\, s\, \mathrm{softsign}_\tau(c) + \big(1 - (1 - w)\, s\big)\, c / \mathrm{rms}(c)
    $$

    $s$ is `Controls.sign_weight`, 1 but under a law that takes the sign away, such as one with a
    plateau guard; outside `stabilize` it is 1. What $\tau$ is worth
    `python -m benchmarks components` measures.

    Args:
        weight: $w$, the share of the momentum, in `[0, 1]`, or a schedule of it: a function of the
            number of good steps.
        temperature: $\tau$ of `soften_sign`, at least 0.
        axis_names: axes of an enclosing `jax.shard_map` over which parameters may be split.

    Returns:
        An `optax.GradientTransformationExtraArgs`; its state is the counter of a schedule, or none.
        See `soften_sign`.

    Raises:
        ValueError: where an argument is outside its range.

    Examples:
        >>> import jax.numpy as jnp, cruxy_optax
        >>> momentum = jnp.array([7.0, 1.0, 0.0, -1.0, -7.0])
        >>> tx = cruxy_optax.blend_sign(weight=0.5, temperature=0.0)
        >>> print(tx.update(momentum, tx.init(momentum))[0].round(2))
        [ 1.28  0.61  0.   -0.61 -1.28]
    """
    temperature, axes = checked_temperature(temperature), as_axes(axis_names)
    if not callable(weight):
        remedy = "0 is the sign alone, 1 the momentum alone"
        weight = check_range("weight", weight, 0.0, 1.0, remedy=remedy)

    def init_fn(params: optax.Params) -> BlendSignState | optax.EmptyState:
        del params
        return BlendSignState(jnp.zeros((), jnp.int32)) if callable(weight) else optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        controls: Controls | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, BlendSignState | optax.EmptyState]:
        del params, extra_args
        share = weight
        if callable(weight):
            share = weight(state.count)
            state = BlendSignState(jnp.asarray(optax.safe_increment(state.count)))
        share = steered(share, controls)
        leaves, treedef = jax.tree.flatten(updates)
        blended = blend(leaves, [share] * len(leaves), temperature, axes)
        return treedef.unflatten(blended), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def steered(weight: Any, controls: Controls | None) -> Any:
    """The share of the momentum that the controls leave, which may take the sign away."""
    if controls is None:
        return weight
    return formulas.momentum_share(weight, controls.sign_weight)


def blend(
    tensors: Sequence[Any], weights: Sequence[Any], temperature: Any, axis_names: tuple[str, ...]
) -> list[jax.Array]:
    """`blend_sign` of tensors, each with a weight of its own."""
    return [
        formulas.blend_sign(c, weight, temperature, rms, xp=jnp)
        for (c, rms), weight in zip(sized(tensors, axis_names), weights, strict=True)
    ]


def sized(tensors: Sequence[Any], axis_names: tuple[str, ...]) -> list[tuple[jax.Array, jax.Array]]:
    """Each tensor, float32 at least, and its root mean square."""
    arrays = list(map(jnp.asarray, tensors))
    rms = together([root(mean_square(c, axis_names)) for c in arrays], arrays, axis_names)
    return [(c.astype(accumulator_dtype(c)), size) for c, size in zip(arrays, rms, strict=True)]


def checked_temperature(temperature: chex.Numeric) -> Any:
    """A temperature, as a plain float where it is a number.

    Raises:
        ValueError: where it is below 0.
    """
    remedy = "0 is the sign, 1 is soft below the root mean square"
    return check_range("temperature", temperature, 0.0, remedy=remedy)
