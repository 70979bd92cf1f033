"""What the last step measured and decided, as numbers by name; kept in the law's state."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cruxy_control import Controls
from cruxy_control.signals import NOT_KNOWN
from cruxy_torch import _scalar_numpy
from cruxy_torch._law_state import CONTROLS, COUNTERS, REPORT, STEERED, namespace

BETAS = ("beta1", "beta2")
"""What only an optimizer has whose decay rates are the law's to move."""


def record(law_state: dict[str, Tensor], values: Mapping[str, Any], *, still: Any = False) -> None:
    """Keeps what a step measured and decided, on the device, until somebody asks.

    Args:
        law_state: where it is kept.
        values: by name.
        still: where true what is there stays.
    """
    report = law_state["report"]
    if namespace(law_state) is not _scalar_numpy:
        rows = torch.stack([values[name].to(torch.float32) for name in REPORT])
        report.copy_(rows if still is False else torch.where(still, report, rows))
    elif not still:
        report.numpy()[...] = [values[name] for name in REPORT]


def everything(law_state: dict[str, Tensor]) -> Tensor:
    """The report, the counters and, of a law that has them, `STEERED`, as one float64 vector."""
    counters = torch.stack([law_state[name] for name in COUNTERS])
    steered = law_state["controls"][len(CONTROLS) - len(STEERED) :]
    return torch.cat([part.to(torch.float64) for part in (law_state["report"], counters, steered)])


def shown(law_state: Any, *, betas: bool) -> frozenset[str]:
    """The names that an optimizer has something to say of; the others are left out.

    Args:
        law_state: the law's own; its `telemetry` names what it decides.
        betas: whether the decay rates are the law's to move.
    """
    decided = getattr(law_state, "telemetry", Controls._fields)
    left_out = set(Controls._fields) - set(decided) - {"ok"}
    every = frozenset((*REPORT, *COUNTERS, *STEERED))
    return every - left_out - (set() if betas else set(BETAS))


def named(numbers: list[float], names: frozenset[str]) -> dict[str, float | int | bool]:
    """Numbers in the order of `everything` by name, counters whole and `ok` a truth value.

    Args:
        numbers: of all names; those of `STEERED` may be missing.
        names: those to keep, see `shown`.
    """
    every = (*REPORT, *COUNTERS, *STEERED)
    named: dict[str, float | int | bool] = dict(zip(every, numbers, strict=False))
    infinite = {"clip_threshold"} if named["ok"] != NOT_KNOWN else set()  # once a step was taken
    for name in (name for name, number in named.items() if number == NOT_KNOWN):
        named[name] = math.inf if name in infinite else math.nan
    named["ok"] = bool(named["ok"])
    named |= {name: int(named[name]) for name in COUNTERS}
    return {name: value for name, value in named.items() if name in names}
