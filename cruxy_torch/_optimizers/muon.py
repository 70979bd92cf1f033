"""Muon in `CruxyOptimizer`: which groups are of matrices, and their betas."""

from typing import Any

from cruxy_control.formulas import orthogonal
from cruxy_control.usual import muon_momentum
from cruxy_torch._checks import listed
from cruxy_torch._optimizers.usual import refuse_lion


def with_betas(group: dict[str, Any], nesterov: bool, interpolation: float) -> dict[str, Any]:
    """A new group, its parameters listed; one of matrices gets the betas of Muon's momentum."""
    group = listed(group)
    if not is_orthogonal(group):
        return group
    nesterov = group.get("use_nesterov", nesterov)
    pull = group.get("interpolation", interpolation)
    return {"betas": momentum_betas(pull, nesterov=nesterov), **group}


def check_group(group: dict[str, Any]) -> None:
    """Raises unless it is known what a group is of, and matrices are not to take Lion."""
    if "role" not in group:
        raise ValueError(
            "direction='muon' must know what each parameter is, got a group without a role; "
            "give cruxy_torch.param_groups(model, lr=...)."
        )
    refuse_lion("muon", group["use_lion"] and is_orthogonal(group))


def momentum_betas(interpolation: float, *, nesterov: bool) -> tuple[float, float]:
    """Muon's momentum as Lion writes its own: `b m_t + (1 - b) g_t` is `b^2 m + (1 - b^2) g_t`."""
    b1 = muon_momentum(interpolation)
    return (b1 * b1 if nesterov else b1, b1)


def is_stacked(group: dict[str, Any]) -> bool:
    """Whether the first axis of a group's parameters counts layers.

    Raises:
        TypeError: where the group says it with anything but a bool.
    """
    stacked = group.get("stacked")
    if stacked is not None and not isinstance(stacked, bool):
        raise TypeError(
            f'"stacked" of a group must be True or False, got {stacked!r}; a pattern of names is '
            "for JAX: give stacked layers a group of their own."
        )
    return bool(stacked)


def is_orthogonal(group: dict[str, Any]) -> bool:
    """Whether a group is of matrices that Muon makes orthogonal.

    What is a vector without the axis of stacked layers is none.

    Raises:
        ValueError: where only some of its parameters are.
        TypeError: see `is_stacked`.
    """
    params = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
    role = str(group.get("role", ""))
    layers = is_stacked(group)
    found = {orthogonal.is_orthogonal(role, p.ndim - layers) for p in params}
    if len(found) > 1:
        raise ValueError(
            f"a group of the role {role!r} must hold matrices alone under direction='muon', got "
            "vectors among them; give them a group of another role."
        )
    return found == {True}
