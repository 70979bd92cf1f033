"""What goes with a mode and a direction of `CruxyOptimizer` where it is not given."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from cruxy_control import SelfDriving
from cruxy_control.law import Law, needs_alignment
from cruxy_control.usual import USUAL, WEIGHT_DECAY, usual_average, usual_law
from cruxy_torch._actuators.direction import Direction


def kind_of(direction: Any, *, lion: bool) -> str:
    """The kind of the direction of a group, a key of `USUAL` where all is well."""
    if lion:
        return "lion"
    return "muon" if direction == "muon" else getattr(direction, "kind", "adam")


def limit_width(direction: Any, *, lion: bool) -> int | None:
    """From which the limits of a group fall: with Muon of none, its embeddings' neither."""
    return USUAL[kind_of(direction, lion=lion)].limit_width


def kind_of_all(direction: Any, params: Iterable[Any], *, lion: bool) -> str:
    """The kind whose law steers all groups: Muon's, else Lion's where any group takes Lion.

    So it is in JAX where directions are mixed. Between Adam and Lion the difference is a limit that
    does not give way.

    Args:
        direction: of the optimizer.
        params: parameters or groups.
        lion: whether a group that does not say so takes Lion.
    """
    groups = [group for group in params if isinstance(group, dict)] or [{}]
    any_lion = any(group.get("use_lion", lion) for group in groups)
    return kind_of(direction, lion=any_lion and direction != "muon")


def options_of(direction: Any, *, lion: bool, driving: bool) -> dict[str, Any]:
    """The decay rates, the decay and the limit of a group for which nobody says any.

    Args:
        direction: of the optimizer.
        lion: whether the group takes Lion.
        driving: whether the law finds the rate.
    """
    if not driving:
        return {"betas": (0.9, 0.999), "weight_decay": 0.01, "relative_limit": None}
    return {
        "betas": (0.9, 0.95 if lion else 0.99),
        "weight_decay": WEIGHT_DECAY,
        "relative_limit": USUAL[kind_of(direction, lion=lion)].relative_limit,
    }


def given(
    betas: Any, weight_decay: float | None, relative_limit: float | Literal["mode"] | None
) -> dict[str, Any]:
    """Those of the options in `options_of` that were given."""
    options = {"betas": betas, "weight_decay": weight_decay}
    limit = {} if relative_limit == "mode" else {"relative_limit": relative_limit}
    return {name: value for name, value in options.items() if value is not None} | limit


def with_usual(law: Law, kind: str, *, ends: bool, interpolation: float = 0.0) -> Law:
    """A law that finds the rate with the set point and the limit of a kind; any other as it is."""
    if not isinstance(law, SelfDriving) or kind not in USUAL:
        return law
    own = usual_law(kind, ends=ends, interpolation=interpolation)
    names = ("set_point", "limit_yield", "excess_share", "search_share", "cooldown_peak")
    return dataclasses.replace(law, **{name: getattr(own, name) for name in names})


def average_of(
    law: Law,
    kind: str,
    averaging: float | Literal["mode"] | None,
    interpolation: float | Literal["mode"],
    *,
    free: bool,
) -> tuple[float | None, float]:
    """The power of the average and how far it pulls, also where a mode says them."""
    if needs_alignment(law) and kind in USUAL:
        power = "usual" if averaging == "mode" else averaging
        pull = "usual" if interpolation == "mode" else interpolation
        return usual_average(kind, power, pull, free=free)
    averaging = None if averaging == "mode" else averaging
    return averaging, 0.0 if interpolation == "mode" else interpolation


def check_direction(direction: Any, law: Law, *, use_lion: bool) -> None:
    """Raises unless a direction can be taken, under this law."""
    if direction is None:
        return
    own = isinstance(direction, Direction)
    if not own and direction != "muon":
        raise TypeError(
            f"direction must be 'muon' or an instance of cruxy_torch.Direction, got {direction!r}; "
            "derive from that class, and give an instance."
        )
    if own and direction.kind not in USUAL:
        raise ValueError(
            f"kind of {type(direction).__name__} must be one of {', '.join(USUAL)}, got "
            f"{direction.kind!r}; it says which limits suit it."
        )
    refuse_lion(direction, use_lion)
    if own and needs_alignment(law) and not direction.moments:
        raise ValueError(
            f"law must not steer by the first moment, of which {type(direction).__name__} keeps "
            f"none to compare with, got {type(law).__name__}; name one in its moments, or use "
            "Meta3()."
        )


def refuse_lion(direction: Any, use_lion: bool) -> None:
    """Raises where Lion is asked for beside a direction."""
    if use_lion:
        raise ValueError(
            f"use_lion must be False where direction says what a gradient becomes, got "
            f"{direction!r} with it; leave one of them out."
        )
