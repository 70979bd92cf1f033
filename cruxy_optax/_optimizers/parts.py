"""Parts of a chain that one option of an optimizer puts in or leaves out."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cruxy_control.checks import check_range
from cruxy_control.controls import neutral
from cruxy_control.law import Law, steers_decay
from cruxy_control.roles import Rule
from cruxy_optax._actuators.average import BITS, average_iterates
from cruxy_optax._actuators.centralize import centralize_kernels
from cruxy_optax._actuators.decay import add_controlled_decayed_weights
from cruxy_optax._memory.quantize import check_bits
from cruxy_optax._roles.rates import scale_by_role
from cruxy_optax._states import direction_kind

Mask = Any | Callable[[optax.Params], Any] | None
"""Where weight decay applies: a tree of booleans, a function that makes one, or everywhere."""


def centralized(centralize: bool) -> list[optax.GradientTransformation]:
    """Gradient centralization; none where it is not asked for."""
    return [centralize_kernels()] if centralize else []


def decayed(
    weight_decay: optax.ScalarOrSchedule, mask: Mask, law: Law
) -> list[optax.GradientTransformation]:
    """Decoupled weight decay as a part of a chain, scaled by a law that does so; none if 0."""
    if not callable(weight_decay):
        weight_decay = check_range("weight_decay", weight_decay, 0.0, remedy="0 switches it off")
    if isinstance(weight_decay, float) and weight_decay == 0.0:
        return []
    if steers_decay(law):
        return [add_controlled_decayed_weights(weight_decay, mask)]
    return [optax.add_decayed_weights(weight_decay, mask)]


def by_role(
    rates: Mapping[str, Any] | None, rules: Iterable[Rule] = (), model: Any = None
) -> list[optax.GradientTransformation]:
    """Rates by role as a part of a chain; none where none are given."""
    return [scale_by_role(rates, rules=rules, model=model)] if rates else []


def averaged(
    averaging: float | None, average_bits: int | None, interpolation: Any = 0.0
) -> list[optax.GradientTransformation]:
    """The average of the iterates as the last part of a chain; none where none is kept."""
    if average_bits is not None:
        check_bits("average_bits", average_bits, BITS)
    return [] if averaging is None else [average_iterates(averaging, average_bits, interpolation)]


def kind_of(direction: Any, adams: Mapping[str, Any]) -> str | None:
    """The kind of a direction, by the state that it has for a small matrix.

    `None` where it has none for that, as with labels or masks for other parameters.

    Raises:
        TypeError: where it is no gradient transformation.
        ValueError: where an argument of Adam's comes with it, or it has a learning rate.
    """
    if not isinstance(direction, optax.GradientTransformation):
        raise TypeError(
            f"direction must be a gradient transformation, got {direction!r}; give one such as "
            "optax.scale_by_lion(), or of several by role optax.partition({...}, "
            "cruxy_optax.label_roles)."
        )
    given = [name for name, value in adams.items() if value is not None]
    if given:
        raise ValueError(
            f"{given[0]} is an argument of Adam's direction, got it beside direction=; give it to "
            "the direction, or put quantize_state() around that."
        )
    like = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    try:
        state = jax.eval_shape(direction.init, like)
    except Exception:  # of whatever kind: it is for trees of its own form
        return None
    if _opposes(direction, like):
        raise ValueError(
            "direction must be without a learning rate, such as optax.scale_by_adam(), got one "
            "whose updates point against the gradient, as those of optax.adam(1e-3) do; leave out "
            "its optax.scale_by_learning_rate()."
        )
    return direction_kind(state)


def _opposes(direction: optax.GradientTransformation, gradient: optax.Updates) -> bool:
    """Whether the first direction of all points against the gradient; false where none comes."""

    def along(gradient: optax.Updates) -> jax.Array:
        params = jax.tree.map(jnp.zeros_like, gradient)
        whole, controls = optax.with_extra_args_support(direction), neutral(jnp.array(True), xp=jnp)
        updates, _ = whole.update(
            gradient, whole.init(params), params, value=jnp.ones(()), controls=controls
        )
        return jnp.asarray(optax.tree.vdot(gradient, updates))

    try:
        with jax.ensure_compile_time_eval():
            return float(jax.jit(along)(gradient)) < 0.0
    except Exception:  # of whatever kind: it may ask for the axes of a mesh, or traced numbers
        return False
