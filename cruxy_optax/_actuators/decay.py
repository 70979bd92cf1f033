"""Weight decay whose coefficient the law scales."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cruxy_control.checks import check_range
from cruxy_control.controls import Controls
from cruxy_optax._controls import require_controls


def add_controlled_decayed_weights(
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""`optax.add_decayed_weights` times `decay_scale`, which `PlateauGuard` moves.

    $$
    u \leftarrow u + c\, \lambda\, \theta, \qquad c = \mathtt{decay\_scale}
    $$

    Behind a direction it is decoupled weight decay, before one it is L2 regularisation. `meta3` and
    the other optimizers decay so under a law that has a true `steers_decay`; under any other law
    `decay_scale` is 1.

    Args:
        weight_decay: the coefficient, at least 0, or a schedule of the number of good steps.
        mask: tree of booleans like (or a prefix of) the parameters, or a function that makes one,
            `True` where weights decay; `None` for everywhere.

    Returns:
        An `optax.GradientTransformationExtraArgs` for the inside of `stabilize`.

    Raises:
        ValueError: where `weight_decay` is below 0; from `update` outside `stabilize`, or without
            `params`.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from cruxy_control import Meta3, PlateauGuard
        >>> from cruxy_optax import (
        ...     add_controlled_decayed_weights, scale_by_meta_learning_rate, stabilize)
        >>> tx = stabilize(
        ...     optax.chain(
        ...         add_controlled_decayed_weights(0.1),
        ...         scale_by_meta_learning_rate(1.0),
        ...     ),
        ...     law=PlateauGuard(Meta3(), patience=2),
        ... )
        >>> params = jnp.ones(())
        >>> state, seen = tx.init(params), []
        >>> for _ in range(20):
        ...     updates, state = tx.update(jnp.zeros(()), state, params, value=1.0)
        ...     seen.append(round(float(updates), 3))
        >>> seen[0], seen[-1]
        (-0.1, -0.01)

    References:
        Loshchilov and Hutter, [Decoupled Weight Decay
        Regularization](https://arxiv.org/abs/1711.05101), 2019.
    """
    if not callable(weight_decay):
        weight_decay = check_range("weight_decay", weight_decay, 0.0, remedy="0 switches it off")
    plain = optax.add_decayed_weights(weight_decay, mask)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        controls: Controls | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        scale = require_controls(controls, "add_controlled_decayed_weights").decay_scale
        nothing = jax.tree.map(jnp.zeros_like, updates)
        decay, state = plain.update(nothing, state, params)
        return jax.tree.map(lambda u, d: u + scale * d, updates, decay), state

    return optax.GradientTransformationExtraArgs(plain.init, update_fn)
