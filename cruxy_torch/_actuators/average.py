"""Averaging the iterates: what replaces a schedule at the end of a run that has no end."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cruxy_torch._blocks import blocks
from cruxy_torch._kept import Kept, raw


def average(params: Sequence[Kept], averages: Sequence[Tensor], weight: Any) -> None:
    """Moves the average of each parameter, where there is one, this share of the way to it.

    Args:
        params: after the step.
        averages: one for each, or none at all.
        weight: from `cruxy_control.formulas.averaging`; a number or a 0-d tensor.
    """
    if not averages:
        return
    for param, mean in zip(params, averages, strict=True):
        for p, block in blocks(raw(param), mean):
            value = weight.to(mean.device) if isinstance(weight, Tensor) else float(weight)
            block.lerp_(p.to(mean.dtype), value)
