"""Muon in `CruxyOptimizer`: which groups are of matrices, their betas, and the law around them."""

import dataclasses
from typing import Any

from cruxy_control import Law, SelfDriving
from cruxy_control.formulas import orthogonal
from cruxy_torch._checks import listed


def steered(law: Law, *, ends: bool) -> Law:
    """The law of a mode, steered to the alignment that suits orthogonal directions."""
    if not isinstance(law, SelfDriving):
        return law
    set_point = orthogonal.SET_POINT_ENDED if ends else orthogonal.SET_POINT
    return dataclasses.replace(law, set_point=set_point)


def with_betas(group: dict[str, Any], nesterov: bool) -> dict[str, Any]:
    """A new group, its parameters listed; one of matrices gets the betas of Muon's momentum."""
    group = listed(group)
    if not is_orthogonal(group):
        return group
    plain = (orthogonal.BETAS[1],) * 2
    betas = orthogonal.BETAS if group.get("use_nesterov", nesterov) else plain
    return {"betas": betas, **group}


def is_orthogonal(group: dict[str, Any]) -> bool:
    """Whether a group is of matrices that Muon makes orthogonal.

    Raises:
        ValueError: where only some of its parameters are.
    """
    params = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
    role = str(group.get("role", ""))
    found = {orthogonal.is_orthogonal(role, p.ndim) for p in params}
    if len(found) > 1:
        raise ValueError(
            f"a group of the role {role!r} must hold matrices alone under direction='muon', got "
            "vectors among them; give them a group of another role."
        )
    return found == {True}
