"""What `SelfDriving` is usually given for a kind of direction, and for a run whose end is known."""

import dataclasses
from typing import Any, NamedTuple

from cruxy_control.law import Law
from cruxy_control.self_driving import SelfDriving


class Usual(NamedTuple):
    """The constants that go with a kind of direction.

    Attributes:
        relative_limit: no tensor moves by more than this share of its size in a step.
        weight_decay: its coefficient.
        set_point: the alignment that is steered to in a run without an end.
        set_point_ended: the same where the end is known.
        limit_yield: how the limit gives way, see `SelfDriving`; `None` for one that holds.
    """

    relative_limit: float
    weight_decay: float
    set_point: float = -0.25
    set_point_ended: float = -0.25
    limit_yield: float | None = 50.0


USUAL = {
    "adam": Usual(0.1, 1e-4),
    "lion": Usual(0.01, 1e-3, limit_yield=None),
    "muon": Usual(0.2, 0.1, -0.15, -0.2, limit_yield=None),
}
"""By the kind of a direction: `"adam"` where its elements are of size 1 or less and shrink,
`"lion"` where they are signs, `"muon"` where matrices are made orthogonal.

An orthogonal step bears a larger rate than the sensor takes Adam's for: it is steered to an
alignment nearer to 0. Only Adam's limit gives way: the others gained nothing by it."""


def end_of(law: Any) -> int | None:
    """The steps of a run whose end a law knows, or the one that it is put around; else `None`."""
    while hasattr(law, "law"):
        law = law.law
    return getattr(law, "total_steps", None)


def usual_law(kind: str, *, ends: bool) -> SelfDriving:
    """The law with the constants of a kind of direction.

    Args:
        kind: a key of `USUAL`.
        ends: whether the end of the run is known.
    """
    own = USUAL[kind]
    set_point = own.set_point_ended if ends else own.set_point
    return SelfDriving(set_point=set_point, limit_yield=own.limit_yield)


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
            f"total_steps needs a law that finds the rate, SelfDriving, got {law!r}; leave it out, "
            "and give a schedule in place of the learning rate."
        )
    return dataclasses.replace(around, law=told_the_end(around.law, total_steps))
