"""The formulas of a sign that is soft: between Lion's sign and a normalised momentum.

`c` is a momentum before its sign is taken and `rms` the root mean square of the whole tensor it
belongs to. All of them depend on `c / rms(c)` alone, so that gradients a thousand times as large
change nothing.
"""

from typing import Any

BLEND = 0.2
"""The share of the momentum in a blend (Tiger)."""


def soften_sign(c: Any, temperature: Any, rms: Any, *, xp: Any) -> Any:
    """`u = (1 + t) c / (|c| + t rms(c))`: the sign at `t = 0`, `c / rms(c)` as `t` grows.

    An element as large as the root mean square has size 1 at every temperature. At `t = 0` the
    result is `sign(c)` to the bit; so it is where all squares are too small for their dtype and
    `rms` is 0. It is a Lion-K direction (Chen et al., arXiv:2310.05898), whose convex function is
    taken anew for the scale of each step.

    Args:
        c: momentum; any shape.
        temperature: `t`, at least 0 and finite.
        rms: root mean square of the tensor of `c`; a scalar, or of a shape that broadcasts.
        xp: the array namespace.

    Returns:
        `u`, like `c`: within `1 + t` in size, 0 at 0. NaN stays NaN but at `t = 0`, where it is
        what `xp.sign` makes of it.
    """
    room = temperature * rms
    soft = room > 0.0
    # Not 0 / 0 even where that is not chosen: its derivative is.
    softened = (1.0 + temperature) * c / (abs(c) + xp.where(soft, room, 1.0))
    return xp.where(soft, softened, xp.sign(c))


def blend_sign(c: Any, weight: Any, temperature: Any, rms: Any, *, xp: Any) -> Any:
    """`(1 - w) softsign(c) + w c / rms(c)`: a sign, and a share of how large the momentum is.

    Args:
        c: momentum; any shape.
        weight: `w`, the share of the momentum, in `[0, 1]`; see `momentum_share`.
        temperature: of `soften_sign`.
        rms: root mean square of the tensor of `c`; a scalar, or of a shape that broadcasts.
        xp: the array namespace.

    Returns:
        The direction, like `c`; 0 where `c` is 0.
    """
    some = rms > 0.0
    unit = xp.where(some, c / xp.where(some, rms, 1.0), c * 0.0)
    return (1.0 - weight) * soften_sign(c, temperature, rms, xp=xp) + weight * unit


def momentum_share(weight: Any, sign_weight: Any) -> Any:
    """`1 - (1 - w) s`: the share of the momentum in a blend whose sign counts `s` of itself.

    Args:
        weight: `w`, the share that was asked for, in `[0, 1]`.
        sign_weight: `s`, as `Controls.sign_weight` has it, in `[0, 1]`; 1 leaves `w`, 0 leaves no
            sign.
    """
    return 1.0 - (1.0 - weight) * sign_weight
