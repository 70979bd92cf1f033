"""What the last step measured and decided, as numbers by name; kept in the law's state."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cruxy_control import Controls
from cruxy_control.controls import DRIVEN, STEERED
from cruxy_control.signals import NOT_KNOWN
from cruxy_torch import _scalar_numpy
from cruxy_torch._law_state import CONTROLS, COUNTERS, REPORT, namespace

BETAS = ("beta1", "beta2")
"""What only an optimizer has whose decay rates are the law's to move."""

EVERY = (*REPORT, *COUNTERS, *STEERED, *DRIVEN)
"""The names of all numbers, in the order of `everything`."""


def record(law_state: dict[str, Tensor], values: Mapping[str, Any], *, still: Any = False) -> None:
    """Keeps what a step measured and decided, on the device, until somebody asks.

    Args:
        law_state: where it is kept.
        values: by name.
        still: where true what is there stays.
    """
    for key, names in (("report", REPORT), ("driven", DRIVEN)):
        report = law_state.get(key)
        if report is None:
            continue
        if namespace(law_state) is not _scalar_numpy:
            rows = torch.stack([values[name].to(torch.float32) for name in names])
            report.copy_(rows if still is False else torch.where(still, report, rows))
        elif not still:
            report.numpy()[...] = [values[name] for name in names]


def everything(law_state: dict[str, Tensor]) -> Tensor:
    """The numbers of `EVERY` as one float64 vector, `NOT_KNOWN` for what the law has not."""
    counters = torch.stack([law_state[name] for name in COUNTERS])
    steered = law_state["controls"][len(CONTROLS) - len(STEERED) :]
    parts = [law_state["report"], counters]
    for own, names in ((steered, STEERED), (law_state.get("driven"), DRIVEN)):
        none = torch.full_like(parts[0][: len(names)], NOT_KNOWN)
        parts.append(none if own is None or not len(own) else own)
    return torch.cat([part.to(torch.float64) for part in parts])


def shown(law_state: Any, *, betas: bool) -> frozenset[str]:
    """The names that an optimizer has something to say of; the others are left out.

    Args:
        law_state: the law's own; its `telemetry` names what it decides.
        betas: whether the decay rates are the law's to move.
    """
    every = tuple(name for name in Controls._fields if name not in DRIVEN)
    decided = getattr(law_state, "telemetry", every)
    left_out = set(Controls._fields) - set(decided) - {"ok"}
    return frozenset(EVERY) - left_out - (set() if betas else set(BETAS))


def named(numbers: list[float], names: frozenset[str]) -> dict[str, float | int | bool]:
    """Numbers in the order of `everything` by name, counters whole and `ok` a truth value.

    Args:
        numbers: of all names.
        names: those to keep, see `shown`.
    """
    named: dict[str, float | int | bool] = dict(zip(EVERY, numbers, strict=True))
    infinite = {"clip_threshold"} if named["ok"] != NOT_KNOWN else set()  # once a step was taken
    for name in (name for name, number in named.items() if number == NOT_KNOWN):
        named[name] = math.inf if name in infinite else math.nan
    named["ok"] = bool(named["ok"])
    named |= {name: int(named[name]) for name in COUNTERS}
    return {name: value for name, value in named.items() if name in names}
