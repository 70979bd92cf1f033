"""From a law's controls to the numbers of an Adam step, over any namespace of scalars."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from cruxy_control import signals as sensing
from cruxy_control.controls import Controls, betas, meta_learning_rate
from cruxy_control.formulas.averaging import averaging_weight
from cruxy_control.formulas.limits import RELATIVE_FLOOR, rate_share, relative_limit, width_share
from cruxy_control.formulas.moments import seen
from cruxy_control.law import Law, needs_alignment, steers_decay
from cruxy_control.signals import NOT_KNOWN, Signals


class AdamOrders(NamedTuple):
    """What one step of Adam is told; scalars of the namespace.

    Attributes:
        beta1: decay rate of the first moment, 1 on a skipped step.
        beta2: of the second, likewise.
        products: of all decay rates so far, this step's included.
        factor1: what the numerator of the direction is multiplied by.
        factor2: what the root of the second moment is multiplied by.
        rate: before any limit, 0 on a skipped step.
    """

    beta1: Any
    beta2: Any
    products: tuple[Any, Any]
    factor1: Any
    factor2: Any
    rate: Any


def adam_orders(
    controls: Controls,
    learning_rate: Any,
    b1: float,
    b2: float,
    products: tuple[Any, Any],
    *,
    nesterov: bool,
    xp: Any,
) -> AdamOrders:
    """What a group of parameters is told.

    Args:
        controls: this step's.
        learning_rate: the user's.
        b1: the user's decay rate of the first moment.
        b2: of the second.
        products: of all decay rates before this step.
        nesterov: whether the numerator is `beta1 m + (1 - beta1) g`.
        xp: the array namespace.
    """
    beta1, beta2 = betas(controls, b1, b2, xp=xp)
    product1, product2 = products[0] * beta1, products[1] * beta2
    factor1 = 1.0 / seen(beta1 * product1 if nesterov else product1, xp=xp)
    factor2 = 1.0 / xp.sqrt(seen(product2, xp=xp))
    rate = meta_learning_rate(controls, learning_rate, xp=xp)
    return AdamOrders(beta1, beta2, (product1, product2), factor1, factor2, rate)


def largest_rates(
    controls: Controls,
    mean_squares: Sequence[Any],
    shapes: Sequence[Sequence[int]],
    limit: float,
    *,
    xp: Any,
) -> list[Any]:
    """The largest rate of each tensor, by its size and width and by the size of all together.

    Args:
        controls: this step's.
        mean_squares: of each tensor.
        shapes: of each tensor.
        limit: the relative limit.
        xp: the array namespace, whose `sum` is of a vector; a sum that no order matters to makes
            the limits those of any order of the tensors.
    """
    sizes = [math.prod(shape) for shape in shapes]
    count = max(1, sum(sizes))
    shares = [square * (size / count) for square, size in zip(mean_squares, sizes, strict=True)]
    whole = xp.sum(xp.stack(shares))
    share = limit * controls.limit_factor
    return [
        relative_limit(square, share, RELATIVE_FLOOR, xp=xp, whole=whole, share=width_share(shape))
        for square, shape in zip(mean_squares, shapes, strict=True)
    ]


def signals_of(
    law: Law,
    grad_norm: Any,
    gamma_norm: Any,
    loss: Any,
    agreement: tuple[Any, Any, Any] | None,
    limit_scale: Any,
    base_rate: Any,
    *,
    xp: Any,
) -> Signals:
    """The signals that a law wants.

    Args:
        law: which.
        grad_norm: the Euclidean norm of the raw gradient.
        gamma_norm: the norm of the law's own exponent.
        loss: `NOT_KNOWN` where there is none.
        agreement: `sum g m`, the root of `sum g^2` and `sum m^2`, the gradients and the moments
            each on any scale; `None` for a law that does not want it.
        limit_scale: what the limit left of the rate in the step before.
        base_rate: the rate that was set in the step before.
        xp: the array namespace.
    """
    if not needs_alignment(law) or agreement is None:
        return Signals(grad_norm, gamma_norm, loss)
    cosine = sensing.alignment(*agreement, xp=xp)
    return Signals(grad_norm, gamma_norm, loss, cosine, limit_scale, base_rate)


__all__ = [
    "NOT_KNOWN",
    "AdamOrders",
    "adam_orders",
    "averaging_weight",
    "largest_rates",
    "needs_alignment",
    "rate_share",
    "signals_of",
    "steers_decay",
]
