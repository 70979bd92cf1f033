"""The weight of an iterate in the average of all of them, and how that pulls the iterates along."""

from typing import Any

POWER = 16.0
"""Of an average that pulls nothing, and the least one while the rate falls."""


def pulls(interpolation: Any) -> bool:
    """Whether an average pulls the parameters along; a traced number may."""
    return not (isinstance(interpolation, float | int) and interpolation == 0.0)


def averaging_weight(count: Any, power: Any, *, xp: Any) -> Any:
    """`(power + 1) / (t + power)`, `t = count + 1`: the weight of step `t` in the average.

    At 0 all iterates weigh the same; a larger `power` forgets the early ones: about the last
    `1 / (power + 1)` of the run counts, however long it is.

    Args:
        count: iterates before this one; int32 or float32.
        power: at least 0.
        xp: the array namespace.

    References:
        Shamir and Zhang, [Stochastic Gradient Descent for Non-smooth
        Optimization](https://arxiv.org/abs/1212.1824), 2013, section 4.
    """
    return (power + 1.0) / (count + 1.0 + power)


def averaging_orders(
    count: Any, power: Any, interpolation: Any, falls: Any, *, xp: Any
) -> tuple[Any, Any]:
    r"""How far parameters are pulled on by their average, and how far that then moves to them.

    $$
    s = \min\left(1, \frac{c_t}{1 - \beta}\right), \qquad
    \theta \leftarrow \theta + \beta s\, (\theta - \bar\theta), \qquad
    \bar\theta \leftarrow \bar\theta + \frac{s}{1 + \beta s} (\theta - \bar\theta)
    $$

    after each step: the average moves by the share `s` of the way to where the step has led, and
    the parameters move by `beta` times as much on top of it. This is schedule-free averaging.
    There a sequence `z` takes steps of `1 / (1 - beta)` times the rate, the average `x` moves by
    `c_t` of the way to it, and gradients are taken at `y = (1 - beta) z + beta x`, which the
    parameters are here: `z` is `x + (y - x) / (1 - beta)` and need not be kept. While the rate
    falls there is no pull, and the average keeps closer to the parameters (`POWER`).

    Args:
        count: see `averaging_weight`.
        power: likewise.
        interpolation: `beta`, in `[0, 1)`; 0 averages and pulls nothing.
        falls: whether the rate falls to an end or under a schedule; false where none can.
        xp: the array namespace.

    Returns:
        The weight of the parameters in the average after they were pulled, and the share of the
        distance from the average by which they are pulled before; `None` where nothing ever is.

    References:
        Defazio et al., [The Road Less Scheduled](https://arxiv.org/abs/2405.15682), 2024,
        equations 9 to 11.
    """
    weight = averaging_weight(count, power, xp=xp)
    if not pulls(interpolation):
        return weight, None
    share = weight / (1.0 - interpolation)
    share = xp.where(share < 1.0, share, 1.0)
    pull = interpolation * share
    if falls is not False:
        close = averaging_weight(count, POWER, xp=xp)
        share = xp.where(falls, xp.where(close > weight, close, weight), share)
        pull = xp.where(falls, 0.0, pull)
    return share / (1.0 + pull), pull
