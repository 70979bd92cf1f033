"""A limit on how far a step moves a tensor, relative to the tensor's own size."""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from cruxy_control.checks import check_range
from cruxy_control.formulas.limits import RELATIVE_FLOOR, limit_scale, relative_limit
from cruxy_optax._distributed.axes import as_axes, mean_square, together
from cruxy_optax._tree import root


def limit_relative_step(
    limit: chex.Numeric = 0.1,
    *,
    floor: chex.Numeric = RELATIVE_FLOOR,
    axis_names: str | Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    r"""Shortens the update of a tensor that would move it by more than a share of its own size.

    $$
    u \leftarrow u \, \min\left(1,
    \frac{\rho \max(\mathrm{rms}(\theta), \text{floor})}{\mathrm{rms}(u)}\right)
    $$

    Put it last in a chain of any optimizer, where updates are what will be added to the parameters,
    with nothing but `average_iterates` behind it. A rate that is far too high then takes steps of
    the share `limit` instead of diverging; below the limit nothing changes. `self_driving` limits
    the rate instead of the update (`scale_by_meta_learning_rate(relative_limit=)`), by the size of
    all parameters as well, and what that leaves of the rate feeds back into the law.
    `optax.adaptive_grad_clip` in the same place limits every row or column by itself.

    Args:
        limit: the share of its root mean square that a tensor moves at most; above 0.
        floor: the root mean square of a tensor counts as at least this, above 0: zeros could never
            move.
        axis_names: axes of an enclosing `jax.shard_map` over which parameters may be split.

    Returns:
        An `optax.GradientTransformationExtraArgs` without state. It is no guard: an update with NaN
        in it passes as it is, one with Inf ends as NaN, and one whose squares overflow (1e19 in
        float32) as 0.

    Raises:
        ValueError: where an argument is outside its range; from `update` without `params`.

    Examples:
        >>> import jax.numpy as jnp, optax, cruxy_optax
        >>> tx = optax.chain(optax.sgd(100.0), cruxy_optax.limit_relative_step(0.1))
        >>> params = {"w": jnp.array([3.0, -3.0]), "b": jnp.zeros(2)}
        >>> updates, _ = tx.update({"w": jnp.ones(2), "b": jnp.ones(2)}, tx.init(params), params)
        >>> print(updates["w"])
        [-0.3 -0.3]
        >>> print(updates["b"])
        [-0.001 -0.001]

    References:
        The scale is that of Adafactor's relative step, section 8 of Shazeer and Stern,
        [Adafactor](https://arxiv.org/abs/1804.04235), 2018.
    """
    limit = check_range("limit", limit, 0.0, lower_open=True, remedy="use 0.1")
    floor = check_range("floor", floor, 0.0, lower_open=True, remedy="keep the default")
    axes = as_axes(axis_names)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del extra_args
        if params is None:
            raise ValueError(
                "limit_relative_step() measures the parameters, but got params=None; call "
                "update(grads, state, params)."
            )
        leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, updates))
        weights = treedef.flatten_up_to(params)
        scales = [scale_of(u, jnp.asarray(p)) for u, p in zip(leaves, weights, strict=True)]
        scales = together(scales, leaves, axes)
        limited = [(u * s).astype(u.dtype) for u, s in zip(leaves, scales, strict=True)]
        return treedef.unflatten(limited), state

    def scale_of(u: jax.Array, p: jax.Array) -> jax.Array:
        largest = relative_limit(mean_square(p, axes), limit, floor, xp=jnp)
        return limit_scale(largest, root(mean_square(u, axes)), xp=jnp)

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
