"""The end of a run under `SelfDriving`, begun at any step."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from cruxy_control.self_driving import (
    SelfDriving,
    SelfDrivingState,
    begin_cooldown,
    check_cooldown,
)
from cruxy_optax._tree import find


def cooldown(opt_state: optax.OptState, steps: chex.Numeric) -> optax.OptState:
    """Begins to end a run: the rate falls from now to 0 over so many steps.

    It starts from `SelfDriving.cooldown_peak` times the rate that was found, which is twice, and
    once with Muon inside, or from where it is if it falls already, so that an end can be put off.
    At 0 everything stands still; a call then begins once more. Works under `jax.jit`, and nothing
    is compiled anew.

    Args:
        opt_state: of an optimizer under `SelfDriving`, of whatever direction.
        steps: good steps until the rate is 0, at least 1; an array below counts as 1.

    Returns:
        The same state but for that.

    Raises:
        ValueError: where the state has no such law, or `steps` is below 1 or no int32.

    Examples:
        >>> import jax.numpy as jnp, cruxy_optax
        >>> tx = cruxy_optax.self_driving()
        >>> params = jnp.ones(3)
        >>> opt_state = cruxy_optax.cooldown(tx.init(params), steps=2)
        >>> for _ in range(3):
        ...     _, opt_state = tx.update(params, opt_state, params)
        ...     print(f"{cruxy_optax.telemetry(opt_state)['learning_rate']:.3f}")
        0.002
        0.001
        0.000
    """
    if not isinstance(steps, jax.Array):
        check_cooldown(steps)
    if not find(opt_state, SelfDrivingState):
        raise ValueError(
            "opt_state must be that of an optimizer under SelfDriving, such as self_driving(), got "
            "one without it; give it a schedule in place of learning_rate."
        )

    steps = jnp.asarray(steps).astype(jnp.int32)

    def one(node: Any) -> Any:
        if not isinstance(node, SelfDrivingState):
            return node
        law = SelfDriving(excess_share=0.5 if node.progress else None)
        plain = jax.tree.structure(law.init(jnp.zeros(()), xp=jnp))
        leaves, boxed = jax.tree.flatten(node)  # nnx.Optimizer puts each number into a box
        state = begin_cooldown(plain.unflatten(leaves), steps, xp=jnp)
        return boxed.unflatten(jax.tree.leaves(state))

    return jax.tree.map(one, opt_state, is_leaf=lambda node: isinstance(node, SelfDrivingState))
