"""Muon in `CruxyOptimizer`: which groups are of matrices, and their betas."""

from typing import Any

from cruxy_control.formulas import orthogonal
from cruxy_control.usual import muon_momentum
from cruxy_torch._checks import listed


def with_betas(group: dict[str, Any], nesterov: bool, interpolation: float) -> dict[str, Any]:
    """A new group, its parameters listed; one of matrices gets the betas of Muon's momentum."""
    group = listed(group)
    if not is_orthogonal(group):
        return group
    b1 = muon_momentum(group.get("interpolation", interpolation))
    ahead = b1 * b1 if group.get("use_nesterov", nesterov) else b1
    return {"betas": (ahead, b1), **group}


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
