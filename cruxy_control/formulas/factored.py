"""The formulas of AXIOM that both frameworks share: a factored second moment needs few of its own.

`u` is the gradient over the root of its factored second moment, so that its size is about 1, and
`m_hat` the bias-corrected average of `u`. Then `m_hat^2` is the signal-to-noise ratio `m^2 / v` of
a coordinate, and no second buffer is needed to know it.
"""

from collections.abc import Sequence
from typing import Any

BOOST_LIMIT = 1.5
"""The largest `streak_boost`."""


def second_moment_decay(count: Any, exponent: Any, *, xp: Any) -> Any:
    """`1 - t^-exponent`, `t = count + 1`: the decay of the second moment (Adafactor, section 7.2).

    It is 0 at the first step, so that nothing needs a bias correction, and grows towards 1.

    Args:
        count: good steps before this one; float32 or int32, `()`.
        exponent: in `(0, 1]`; 0.8 is the paper's.
        xp: the array namespace.

    References:
        Shazeer and Stern, [Adafactor](https://arxiv.org/abs/1804.04235), 2018.
    """
    step = count * 1.0 + 1.0
    return 1.0 - xp.exp(-exponent * xp.log(step))


def factored_axes(shape: Sequence[int], min_dim: int) -> tuple[int, int] | None:
    """The second largest and the largest axis; `None` where the second is below `min_dim`.

    Of equal ones the later counts as the larger, as in optax.

    Args:
        shape: of a tensor.
        min_dim: elements along an axis from which on a tensor is factored over it.
    """
    if len(shape) < 2:
        return None
    second, first = sorted(range(len(shape)), key=lambda axis: shape[axis])[-2:]
    return None if shape[second] < min_dim else (second, first)


def inverse_power(v: Any, power: Any, *, xp: Any) -> Any:
    """`v^(-power / 2)`: what a gradient is multiplied by (Padam's partial adaptivity).

    The whole root at 1, no preconditioner at 0. Below 1 the size of `g v^(-power / 2)` is about
    `|g|^(1 - power)`, no longer 1: a rate is then one for gradients of this size alone. Through a
    logarithm, whose derivative is still finite at the smallest means.

    Args:
        v: a second moment, or one of its two factors, above 0; any shape.
        power: in `[0, 1]`.
        xp: the array namespace.

    References:
        Chen et al., [Padam](https://arxiv.org/abs/1806.06763), 2018, algorithm 1; `power` is twice
        its `p`.
    """
    return xp.exp(-0.5 * power * xp.log(v))


def streak_factor(m_hat: Any, boost: Any, *, xp: Any) -> Any:
    """Factor on a coordinate: up to `boost` where its sign has persisted, 1 where it has not.

    `1 + (boost - 1) min(1, |m_hat|)`: the average of a normalised gradient has size 1 only where
    its sign was always the same.

    Args:
        m_hat: bias-corrected average of `u`; any shape.
        boost: in `[1, 1.5]`; 1 leaves all as it is.
        xp: the array namespace.
    """
    return 1.0 + (boost - 1.0) * xp.clip(abs(m_hat), 0.0, 1.0)


def snr_factor(mean_square: Any, floor: Any, *, xp: Any) -> Any:
    """Factor on a block: below 1 where its signal-to-noise ratio is below `floor`.

    `min(1, snr / floor)`, with `snr` the mean of `m_hat^2` over the block. Noise alone has
    `(1 - b1) / (1 + b1)`, 0.053 at `b1 = 0.9`.

    Args:
        mean_square: mean of `m_hat^2` over each block; any shape.
        floor: in `(0, 1)`.
        xp: the array namespace.
    """
    return xp.clip(mean_square / floor, 0.0, 1.0)
