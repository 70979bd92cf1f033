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
    nesterov = group.get("use_nesterov", nesterov)
    pull = group.get("interpolation", interpolation)
    return {"betas": momentum_betas(pull, nesterov=nesterov), **group}


def momentum_betas(interpolation: float, *, nesterov: bool) -> tuple[float, float]:
    """Muon's momentum as Lion writes its own: `b m_t + (1 - b) g_t` is `b^2 m + (1 - b^2) g_t`."""
    b1 = muon_momentum(interpolation)
    return (b1 * b1 if nesterov else b1, b1)


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
