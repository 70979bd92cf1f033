"""Whether steps are too large for the noise: the excess of the iterate in units of its progress.

Where steps are too large for the noise of their gradients, the iterate lies high above its average,
and the average does not come down. Both are measured in units of the loss, whatever the batch.
"""

from typing import Any, NamedTuple

from cruxy_control import filters
from cruxy_control.formulas.averaging import averaging_weight
from cruxy_control.signals import known

DECAY = 0.97
"""Of the averages of excess and loss."""

EARLY, LATE = 2.0, 5.0
"""Powers of the two means of the loss; in the logarithm of the steps they lag by 1/3 and 1/6.
Larger ones forget the start sooner, where a loss may fall from anywhere, and are noisier."""

OUTLIER, LOSS_OUTLIER = 10.0, 2.0
"""Times the usual one that a gradient, and a loss, count for at most: one bad batch cannot steer
for hundreds of steps."""

SETTLED = 20
"""Measured steps before which there is no share: the means are of the first few losses."""


class NoProgress(NamedTuple):
    """What a law keeps that does not ask for the excess: nothing."""


class Progress(NamedTuple):
    """The averages behind the share.

    Attributes:
        excess: of the excess.
        loss: of the loss.
        early: mean of all losses, late ones more; float32, `()`.
        late: the same of later ones; float32, `()`.
        count: losses in them; int32, `()`.
    """

    excess: filters.Ema
    loss: filters.Ema
    early: Any
    late: Any
    count: Any


def no_steps(like: Any, *, xp: Any) -> Progress:
    """Nothing measured yet; on the device of the 0-d array `like`."""
    zeros = [filters.zero(like, xp=xp) for _ in range(6)]
    averages = filters.Ema(*zeros[:2]), filters.Ema(*zeros[2:4])
    return Progress(*averages, *zeros[4:], count=filters.zero_count(like, xp=xp))


def measured(excess: Any, loss: Any) -> Any:
    """Whether a step tells anything: both are known."""
    return known(excess) & known(loss)


def advance(
    state: Progress, excess: Any, loss: Any, norm: Any, usual_norm: Any, *, xp: Any
) -> Progress:
    """The averages with one step more; as they were where excess or loss are not known.

    Args:
        state: before.
        excess: `Signals.excess`.
        loss: of the same step.
        norm: of the gradient in it.
        usual_norm: an average of that over steps before; 0 for none.
        xp: the array namespace.
    """
    sure = measured(excess, loss)
    outlier = (usual_norm > 0.0) & (norm > OUTLIER * usual_norm)
    share = xp.where(outlier, OUTLIER * usual_norm, 1.0) / xp.where(outlier, norm, 1.0)
    excess, loss = xp.where(sure, excess, 0.0) * share, xp.where(sure, loss, 0.0)
    most = LOSS_OUTLIER * abs(state.loss.value)
    loss = xp.where((most > 0.0) & (loss > most), most, loss)
    early, late = (averaging_weight(state.count, power, xp=xp) for power in (EARLY, LATE))
    new = Progress(
        filters.ema(state.excess, excess, DECAY, debias=True),
        filters.ema(state.loss, loss, DECAY, debias=True),
        state.early + early * (loss - state.early),
        state.late + late * (loss - state.late),
        filters.next_count(state.count, xp=xp),
    )
    return filters.select(sure, new, state, xp=xp)


def adapted(state: Progress, fixed: float, share: float, span: float, *, xp: Any) -> Any:
    r"""The set point that the excess asks for.

    $$
    \begin{aligned}
    r &= E / (L_2 - L_5) \cdot (1/3 - 1/6), &
    w &= \mathrm{clip}(1 - E / L, 0, 1), \\
    a^* &= (1 - w)\, a^*_0 - w\, s\, \mathrm{clip}(1 - r / r_0, -1, 1)
    \end{aligned}
    $$

    with $E$ and $L$ the averages of excess and loss, and $L_p$ the mean of all losses with weights
    $t^p$: a loss that falls by $c$ with every factor of $e$ in the steps has
    $L_p = L + c / (p + 1)$, so that $r$ is $E / c$. Where the loss does not fall at all it is
    infinite, of the sign of the excess. $w$ is near 1 where the data cannot be fitted. Once they
    are, the loss has nowhere to go, and the excess, which sees the slope where the iterate is, is
    larger than all the loss there: then the set point stays.

    Args:
        state: the averages.
        fixed: $a^*_0$, that of the law.
        share: $r_0$, the share that is steered to.
        span: $s$, how far from 0 the set point may be.
        xp: the array namespace.
    """
    excess, loss = state.excess.value, state.loss.value
    fall = (state.early - state.late) / (1.0 / (EARLY + 1.0) - 1.0 / (LATE + 1.0))
    falls = fall > 0.0
    ratio = xp.where(falls, excess, 0.0) / (share * xp.where(falls, fall, 1.0))
    lead = xp.where(falls, 1.0 - ratio, xp.where(excess > 0.0, -1.0, 1.0))
    some = loss > 0.0
    unfitted = 1.0 - xp.where(some, excess, 1.0) / xp.where(some, loss, 1.0)
    weight = xp.where(state.count >= SETTLED, xp.clip(unfitted, 0.0, 1.0), 0.0)
    return (1.0 - weight) * fixed - weight * span * xp.clip(lead, -1.0, 1.0)
