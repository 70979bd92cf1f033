"""Parts of a chain that one option of an optimizer puts in or leaves out."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optax

from cruxy_control.checks import check_range
from cruxy_control.law import Law, steers_decay
from cruxy_control.roles import Rule
from cruxy_optax._actuators.average import BITS, average_iterates
from cruxy_optax._actuators.centralize import centralize_kernels
from cruxy_optax._actuators.decay import add_controlled_decayed_weights
from cruxy_optax._memory.quantize import check_bits
from cruxy_optax._roles.rates import scale_by_role

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
