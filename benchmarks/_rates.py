"""What is the same for every optimizer in both frameworks: grids of rates, decay and schedule."""

import math

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""The grid of Wortsman et al. (2023), for optimizers whose step is about the rate."""

STARTS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Where an optimizer starts to look that finds its rate itself: seven decades instead of three."""

WEIGHT_DECAY = 0.1


def scaled(grid: tuple[float, ...], scale: float) -> tuple[float, ...]:
    """A grid times a scale, in six digits.

    Examples:
        >>> scaled((1e-3, 3e-3), 0.1)
        (0.0001, 0.0003)
    """
    return tuple(float(f"{scale * rate:.6g}") for rate in grid)


def warm_up_cosine(step: int, steps: int) -> float:
    """The rate's factor: linear warm-up over a tenth of the run, then a cosine to zero.

    In JAX optax's own schedule says the same.

    Args:
        step: how many steps were taken, from 0 to `steps`.
        steps: of the whole run.

    Examples:
        >>> [round(warm_up_cosine(step, 20), 3) for step in (0, 1, 2, 11, 20)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    warm_up = steps // 10
    if step < warm_up:
        return step / warm_up
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warm_up) / (steps - warm_up))))
