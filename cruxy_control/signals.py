"""What the sensors report to the control law: a few scalars a step, from the raw gradient."""

from typing import Any, NamedTuple

NOT_KNOWN = 3.4028234663852886e38
"""Stands for a loss or an alignment that is not known, and for no threshold: the largest float32.

NaN and infinity are understood as well. But a state that has one of them where all is as it should
be stops `jax_debug_nans`, and looks damaged to whoever searches a checkpoint for them."""


def known(signal: Any) -> Any:
    """Whether a loss or an alignment is known; false of NaN, of infinity and of `NOT_KNOWN`."""
    return abs(signal) < NOT_KNOWN


def root(x: Any, *, xp: Any) -> Any:
    """`sqrt(x)` with the derivative 0 at 0, where an infinite one would end as NaN."""
    some = x > 0.0
    return xp.where(some, xp.sqrt(xp.where(some, x, 1.0)), x)


class Signals(NamedTuple):
    """One step's measurements.

    Attributes:
        grad_norm: Euclidean norm of the raw gradient over all parameters; float32, shape `()`.
        gamma_norm: `sigma = (sum |g|^gamma)^(1/gamma)` over all parameters (WP 1), with the
            law's own `gamma`; float32, shape `()`.
        loss: the step's loss; float32, shape `()`. `NOT_KNOWN` or NaN where there is none: a
            missing and a non-finite loss are treated alike.
        alignment: cosine between the raw gradient and the first moment before this step, over all
            parameters; float32, shape `()`; `NOT_KNOWN` or NaN where one of them is zero. `None`
            unless the law has a true `needs_alignment`, as the next.
        limit_scale: the largest share of the rate that a relative limit left any tensor in the
            step before; float32, shape `()`; 1 where nothing was limited, 0 where nothing moved
            because every rate was 0.
        base_rate: the learning rate that was set in the step before, ahead of every factor of a
            law; the largest there was; float32, shape `()`; 0 before the first step.
        momentum_ratio: `|m| / |g|` of the two that the alignment is taken of; float32, shape `()`;
            `NOT_KNOWN` or NaN where it is not known.
        excess: `sum g (p - average)` over all parameters and their averages: to first order, how
            much higher the loss is than at the average; float32, shape `()`; `NOT_KNOWN` or NaN
            where there is no average. `None` unless the law has a true `needs_excess`.
    """

    grad_norm: Any
    gamma_norm: Any
    loss: Any
    alignment: Any = None
    limit_scale: Any = None
    base_rate: Any = None
    momentum_ratio: Any = None
    excess: Any = None


def momentum_ratio(moment_square: Any, grad_norm: Any, *, xp: Any) -> Any:
    """`|m| / |g|`; `NOT_KNOWN` where that is no finite number above 0.

    Args:
        moment_square: `sum m^2`.
        grad_norm: the root of `sum g^2`.
        xp: the array namespace.
    """
    length = root(moment_square, xp=xp)
    sure = (grad_norm > 0.0) & (length > 0.0) & xp.isfinite(grad_norm) & xp.isfinite(length)
    ratio = xp.where(sure, length, 1.0) / xp.where(sure, grad_norm, 1.0)
    return xp.where(sure, xp.clip(ratio, 0.0, NOT_KNOWN), NOT_KNOWN)


def alignment(along: Any, grad_norm: Any, moment_square: Any, *, xp: Any) -> Any:
    """The cosine between gradient and first moment.

    `NOT_KNOWN` where one of them is zero or their lengths multiply to no finite number above 0.

    Args:
        along: `sum g m` over all elements.
        grad_norm: the root of `sum g^2`.
        moment_square: `sum m^2`.
        xp: the array namespace.
    """
    # Roots before the product, whose square could overflow.
    lengths = grad_norm * root(moment_square, xp=xp)
    sure = (lengths > 0.0) & xp.isfinite(lengths) & xp.isfinite(along)
    # Not 0 / 0 even where that is not chosen: its derivative is.
    cosine = xp.where(sure, along, 0.0) / xp.where(sure, lengths, 1.0)
    return xp.where(sure, xp.clip(cosine, -1.0, 1.0), NOT_KNOWN)
