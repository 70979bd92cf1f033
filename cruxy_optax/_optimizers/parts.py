"""Parts of a chain that one option of an optimizer puts in or leaves out."""

from collections.abc import Callable
from typing import Any

import optax

from cruxy_control.checks import check_range
from cruxy_optax._actuators.centralize import centralize_kernels

Mask = Any | Callable[[optax.Params], Any] | None
"""Where weight decay applies: a tree of booleans, a function that makes one, or everywhere."""


def centralized(centralize: bool) -> list[optax.GradientTransformation]:
    """Gradient centralization; none where it is not asked for."""
    return [centralize_kernels()] if centralize else []


def decayed(weight_decay: optax.ScalarOrSchedule, mask: Mask) -> list[optax.GradientTransformation]:
    """Decoupled weight decay as a part of a chain; none where it is 0."""
    if not callable(weight_decay):
        weight_decay = check_range("weight_decay", weight_decay, 0.0, remedy="0 switches it off")
    if isinstance(weight_decay, float) and weight_decay == 0.0:
        return []
    return [optax.add_decayed_weights(weight_decay, mask)]
