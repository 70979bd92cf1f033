"""The weight of an iterate in the average of all of them."""

from typing import Any


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
