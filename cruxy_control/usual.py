"""What `SelfDriving` is usually given for a kind of direction, and for a run whose end is known."""

import dataclasses
from typing import Any, Literal, NamedTuple

from cruxy_control.formulas.averaging import POWER, pulls
from cruxy_control.formulas.limits import LIMIT_WIDTH
from cruxy_control.law import Law, short
from cruxy_control.self_driving import SelfDriving

WEIGHT_DECAY = 0.1
"""Of what has at least two axes, multiplied by the rate that is found."""


class Usual(NamedTuple):
    """The constants that go with a kind of direction.

    Attributes:
        relative_limit: no tensor moves by more than this share of its size in a step.
        limit_width: of a tensor above which that share falls, see `width_share`; `None` for none.
        set_point: the alignment that is steered to in a run without an end.
        set_point_ended: the same where the end is known.
        set_point_pulled: the same where the average pulls the parameters along.
        limit_yield: how the limit gives way, see `SelfDriving`; `None` for one that holds.
        interpolation: how far the average pulls, see `averaging_orders`.
        power_pulled: of an average that pulls.
        excess_share: see `SelfDriving`, of an average that pulls; `None` for a fixed set point.
        search_pulled: `SelfDriving.search_share` of an average that pulls.
        peak_pulled: `SelfDriving.cooldown_peak` of such a one.
    """

    relative_limit: float
    limit_width: int | None = LIMIT_WIDTH
    set_point: float = -0.25
    set_point_ended: float = -0.25
    set_point_pulled: float = -0.2
    limit_yield: float | None = 50.0
    interpolation: float = 0.0
    power_pulled: float = 3.0
    excess_share: float | None = None
    search_pulled: float = 0.2
    peak_pulled: float = 2.0


USUAL = {
    "adam": Usual(0.1),
    "lion": Usual(0.01, 384, limit_yield=None),
    "muon": Usual(
        *(0.2, None, -0.15, -0.2, -0.07),
        limit_yield=None,
        interpolation=0.7,
        power_pulled=2.0,
        excess_share=0.5,
        search_pulled=0.8,
        peak_pulled=1.0,
    ),
}
"""By the kind of a direction: `"adam"` where its elements are of size 1 or less and shrink,
`"lion"` where they are signs, `"muon"` where matrices are made orthogonal.

An orthogonal step bears a larger rate than the sensor takes Adam's for: it is steered to an
alignment nearer to 0, as is a step of which an average that pulls soon undoes a share. Lion's limit
is a tenth of Adam's, and holds up to the widest model that it was measured on. Only Adam's limit
gives way: the others gained nothing by it. Only Muon's average pulls: with Adam's direction
language models gain by it, and small tasks lose. There the set point is moved by the excess over
that average; -0.07 is where it begins, and where it stays without a loss. A known end then begins
late, in the last fifth: until then the law follows the noise, and the average does what a fall of
the rate would. Twice the rate would be too much where gradients are noise."""

Given = float | Literal["usual"]
"""A number, or that which goes with the kind of the direction."""


def usual_average(
    kind: str, averaging: Given | None, interpolation: Given, *, free: bool
) -> tuple[float | None, float]:
    """The power of an average and how far it pulls, where they are given and where they are not.

    Args:
        kind: a key of `USUAL`.
        averaging: `None` for no average.
        interpolation: see `averaging_orders`.
        free: whether the run has the usual law; otherwise nothing pulls unless it is asked for.
    """
    own = USUAL[kind]
    if averaging is None:
        return None, 0.0
    if isinstance(interpolation, str):
        interpolation = own.interpolation if isinstance(averaging, str) and free else 0.0
    if isinstance(averaging, str):
        averaging = own.power_pulled if pulls(interpolation) else POWER
    return averaging, interpolation


def muon_momentum(interpolation: Any) -> float:
    """The decay rate of the matrices' momentum: shorter where the average holds steps back too."""
    return 0.9 if pulls(interpolation) else 0.95


def end_of(law: Any) -> int | None:
    """The steps of a run whose end a law knows, or the one that it is put around; else `None`."""
    while hasattr(law, "law"):
        law = law.law
    return getattr(law, "total_steps", None)


def usual_law(kind: str, *, ends: bool, interpolation: Any = 0.0) -> SelfDriving:
    """The law with the constants of a kind of direction.

    Args:
        kind: a key of `USUAL`.
        ends: whether the end of the run is known.
        interpolation: how far an average pulls.
    """
    own = USUAL[kind]
    set_point = own.set_point_ended if ends else own.set_point
    law = SelfDriving(set_point=set_point, limit_yield=own.limit_yield)
    if not pulls(interpolation):
        return law
    return dataclasses.replace(
        law,
        set_point=own.set_point_pulled,
        excess_share=own.excess_share,
        search_share=own.search_pulled,
        cooldown_peak=own.peak_pulled,
    )


def told_the_end(law: Law, total_steps: int | None) -> Law:
    """The law that knows how many steps there are, also where it lies in another; `None` for none.

    Raises:
        ValueError: where there is no `SelfDriving` to be told.
    """
    if total_steps is None:
        return law
    if isinstance(law, SelfDriving):
        return dataclasses.replace(law, total_steps=total_steps)
    around: Any = law
    if not hasattr(around, "law"):
        raise ValueError(
            f"total_steps needs a law that finds the rate, SelfDriving, got {short(law)}; leave it "
            "out, and give a schedule in place of the learning rate."
        )
    return dataclasses.replace(around, law=told_the_end(around.law, total_steps))
