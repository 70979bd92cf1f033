"""Averaging the iterates: what replaces a schedule at the end of a run that has no end."""

from collections.abc import Sequence

from torch import Tensor

from cruxy_torch import _near
from cruxy_torch._blocks import blocks
from cruxy_torch._kept import Coded, Kept, raw
from cruxy_torch._orders import Orders


def average(params: Sequence[Kept], averages: Sequence[Kept], orders: Orders) -> None:
    """Moves the average of each parameter, where there is one, its share of the way to it.

    Args:
        params: after the step.
        averages: one for each, or none at all.
        orders: of the step; the share is its `average_weight`.
    """
    if not averages:
        return
    weight = orders.average_weight
    on_device = {mean.device: mean for mean in averages if isinstance(mean, Coded)}
    there = {device: orders.to(device) for device in on_device}
    for param, mean in zip(params, averages, strict=True):
        for p, block in blocks(raw(param), mean):
            if isinstance(block, Coded):
                _near.move(p, block, there[block.device])
                continue
            value = weight.to(block.device) if isinstance(weight, Tensor) else float(weight)
            block.lerp_(p.to(block.dtype), value)
