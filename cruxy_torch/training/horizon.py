"""The end of a run, as the loops that know it tell it to self-driving optimizers."""

from typing import Any
from weakref import WeakKeyDictionary

from cruxy_torch._optimizers.directed import DirectedOptimizer

_TOLD: WeakKeyDictionary[DirectedOptimizer, int] = WeakKeyDictionary()
"""What each optimizer was told here, which may be said anew; an end of the user's own may not."""


def tell_the_end(optimizer: Any, steps: int, taken: int) -> None:
    """Tells a self-driving optimizer when a run ends, unless its user has said so.

    The law counts the steps of all runs, so that those before this one are added. Where a state is
    loaded, tell the end before, which gives the law the constants of a run with an end, and again
    after, when the state says what was before.

    Args:
        optimizer: any; what does not find its rate is left alone.
        steps: of this run, from its beginning to its end.
        taken: how many of them were taken, skipped ones included; 0 but where it is resumed.
    """
    if not isinstance(optimizer, DirectedOptimizer) or not optimizer.finds_rate:
        return
    if optimizer.total_steps in (None, _TOLD.get(optimizer)):
        seen = optimizer.telemetry()
        before = max(0, int(seen["step"] + seen["skipped_total"]) - taken)
        _TOLD[optimizer] = max(2, before + steps)
        optimizer.set_total_steps(_TOLD[optimizer])
