"""How controls reach the actuators: as an extra argument, and as plain scalars in memory."""

from typing import Any

import jax
import jax.numpy as jnp

from cruxy_control.controls import DRIVEN, STEERED, Controls
from cruxy_control.law import Law, needs_alignment, steers_decay
from cruxy_control.signals import NOT_KNOWN
from cruxy_optax._tree import find, materialize


def require_controls(controls: Controls | None, name: str) -> Controls:
    """The controls, or an error that says where the actuator called `name` belongs.

    Raises:
        ValueError: where there are none.
    """
    if controls is None:
        raise ValueError(
            f"{name}() must run inside stabilize(), which measures the gradient and hands it its "
            f"controls, but got controls=None; write stabilize(optax.chain({name}(), ...), "
            "law=Meta3())."
        )
    return controls


def materialize_controls(controls: Controls) -> Controls:
    """The controls as `materialize`d scalars; `ok` stays boolean."""
    known = (1.0 if scalar is None else scalar for scalar in controls)
    kept = Controls(*materialize(*known))
    return kept._replace(ok=kept.ok > 0.0)


def storable(controls: Controls, law: Law) -> Controls:
    """The controls as a state keeps them: `NOT_KNOWN` for the infinite threshold of no clipping.

    What only another kind of law has something to say of is `None`.
    """
    kept = controls._replace(clip_threshold=jnp.minimum(controls.clip_threshold, NOT_KNOWN))
    unsaid = () if steers_decay(law) else STEERED
    unsaid += () if needs_alignment(law) else DRIVEN
    return kept._replace(**dict.fromkeys(unsaid))


def any_step_taken(state: Any) -> jax.Array | bool:
    """Whether a controller in this state let the last step count; true where there is none."""
    conditions = [controls.ok for controls in find(state, Controls)]
    return jnp.any(jnp.stack(conditions)) if conditions else True
