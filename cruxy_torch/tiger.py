"""The names of the package `tiger_optim`: what is written for it runs with this module instead.

`Tiger` and `build_tagged_param_groups` are at the root of `cruxy_torch` too. The rest are other
names for `cruxy_torch.backends`: Tiger's accelerators in Rust and Julia do not exist here, the C
library and torch's foreach calls do. No order is found by timing. `Tiger` itself is stepped tensor
by tensor; what is chosen here holds for the other optimizers.

Importing this module reads `TIGER_ACCEL_PREFER` and `TIGER_ACCEL_DISABLE`, where one of them is
set; see `refresh_backend_state`.
"""

import os
from collections.abc import Sequence
from typing import Any

from cruxy_control.tagged import RATES
from cruxy_torch._native import library
from cruxy_torch._optimizers.tiger import Tiger
from cruxy_torch._roles.tagged import SLICE_RATES, build_tagged_param_groups
from cruxy_torch.backends import backends, chosen, use_backend

__all__ = [
    "RATES",
    "SLICE_RATES",
    "Tiger",
    "available_backends",
    "backend_diagnostics",
    "build_tagged_param_groups",
    "configure_backends",
    "current_backend_priority",
    "refresh_backend_state",
    "reset_backend_configuration",
]


def available_backends() -> dict[str, bool]:
    """By name whether a backend can be taken; see `cruxy_torch.backends`.

    Examples:
        >>> from cruxy_torch.tiger import available_backends
        >>> available_backends()["reference"]
        True
    """
    return {backend.name: backend.available for backend in backends()}


def current_backend_priority() -> list[str]:
    """The backends in the order in which a tensor on the CPU takes them.

    Examples:
        >>> from cruxy_torch.tiger import configure_backends, current_backend_priority
        >>> configure_backends(preferred=["foreach"])
        >>> current_backend_priority()
        ['foreach', 'reference']
        >>> configure_backends()
    """
    first = {"foreach": ["foreach"], "reference": []}
    return [*first.get(chosen(), ["native"]), "reference"]


def configure_backends(
    preferred: Sequence[str] | None = None, disabled: Sequence[str] | None = None
) -> None:
    """Chooses the first of the preferred backends that is available and not disabled.

    `use_backend` in Tiger's words. With neither argument it is automatic again.

    Args:
        preferred: names, the best first; `"rust"` and `"julia"`, which do not exist here, stand for
            `"native"`.
        disabled: names; `"all"` leaves `"reference"`.

    Raises:
        ValueError: where there is no backend of a name.
    """
    use_backend(_first(preferred or (), disabled or ()))


def reset_backend_configuration() -> None:
    """Takes back what `configure_backends` chose: automatic again."""
    use_backend(None)


def refresh_backend_state(reload: bool = False, reset_metrics: bool = False) -> None:
    """Reads `TIGER_ACCEL_PREFER` and `TIGER_ACCEL_DISABLE` anew, names with commas between them.

    Args:
        reload: builds the C library if need be.
        reset_metrics: without effect: nothing is timed.

    Raises:
        ValueError: where there is no backend of a name.
    """
    configure_backends(*map(_names, _VARIABLES))
    if reload:
        library.found(build=True)


def backend_diagnostics() -> dict[str, dict[str, Any]]:
    """By name what `cruxy_torch.backends` says of a backend: `available`, `why`, `path`, `flags`.

    Examples:
        >>> from cruxy_torch.tiger import backend_diagnostics
        >>> backend_diagnostics()["foreach"]["available"]
        True
    """
    return {backend.name: backend._asdict() for backend in backends()}


_VARIABLES = "TIGER_ACCEL_PREFER", "TIGER_ACCEL_DISABLE"


def _names(variable: str) -> list[str]:
    return [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]


def _first(preferred: Sequence[str], disabled: Sequence[str]) -> str | None:
    """The backend that a preference comes to; `None` for automatic."""
    known = ("native", "triton", "foreach", "reference")
    stand_for = {"rust": ["native"], "julia": ["native"], "all": ["native", "triton", "foreach"]}
    wanted, barred = (
        [own for name in names for own in stand_for.get(name, [name])]
        for names in (preferred, disabled)
    )
    for name in (*wanted, *barred):
        if name not in known:
            raise ValueError(
                f"backends must be of {', '.join(map(repr, known))}, got {name!r}; 'all' disables "
                "all but the reference."
            )
    if not wanted and not barred:
        return None
    there = available_backends()
    order = wanted or list(known)
    return next((name for name in order if name not in barred and there[name]), "reference")


if any(map(_names, _VARIABLES)):
    refresh_backend_state()
