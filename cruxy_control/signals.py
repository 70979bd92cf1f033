"""What the sensors report to the control law: a few scalars a step, from the raw gradient."""

from typing import Any, NamedTuple


class Signals(NamedTuple):
    """One step's measurements.

    Attributes:
        grad_norm: Euclidean norm of the raw gradient over all parameters; float32, shape `()`.
        gamma_norm: `sigma = (sum |g|^gamma)^(1/gamma)` over all parameters (WP 1), with the
            law's own `gamma`; float32, shape `()`.
        loss: the step's loss; float32, shape `()`. NaN where there is none: a missing and a
            non-finite loss are treated alike.
        alignment: cosine between the raw gradient and the first moment before this step, over all
            parameters; float32, shape `()`; NaN where one of them is zero. `None` unless the law
            has a true `needs_alignment`, as the next.
        limit_scale: the largest share of the rate that a relative limit left any tensor in the
            step before; float32, shape `()`; 1 where nothing was limited, 0 where nothing moved
            because every rate was 0.
    """

    grad_norm: Any
    gamma_norm: Any
    loss: Any
    alignment: Any = None
    limit_scale: Any = None


def alignment(along: Any, grad_norm: Any, moment_square: Any, *, xp: Any) -> Any:
    """The cosine between gradient and first moment; NaN where one of them is zero.

    Args:
        along: `sum g m` over all elements.
        grad_norm: the root of `sum g^2`.
        moment_square: `sum m^2`.
        xp: the array namespace.
    """
    # Roots before the product, whose square could overflow.
    return xp.clip(along / (grad_norm * xp.sqrt(moment_square)), -1.0, 1.0)
