"""Averaging the iterates: what replaces a schedule at the end of a run that has no end."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cruxy_exact.random_bits import stream_key
from cruxy_torch import _near
from cruxy_torch._blocks import blocks
from cruxy_torch._kept import Coded, Kept, Rounded, compute_dtype, raw, read, write
from cruxy_torch._orders import Orders, scalar


def average(params: Sequence[Kept], averages: Sequence[Kept], orders: Orders) -> None:
    """Pulls each parameter on from its average, where there is one, and moves that towards it.

    Args:
        params: after the step.
        averages: one for each, or none at all.
        orders: of the step; see its `average_weight` and `average_pull`.
    """
    if not averages:
        return
    weight, pull = orders.average_weight, orders.average_pull
    devices = {mean.device for mean in averages if pull is not None or isinstance(mean, Coded)}
    on_device = {device: orders.to(device) for device in devices}
    for param, mean in zip(params, averages, strict=True):
        there = on_device.get(mean.device, orders)
        if pull is not None:
            _pull(param, mean, there)
        for p, block in blocks(raw(param), mean):
            if isinstance(block, Coded):
                _near.move(p, block, there)
                continue
            value = weight.to(block.device) if isinstance(weight, Tensor) else float(weight)
            block.lerp_(p.to(block.dtype), value)


def _pull(param: Kept, mean: Kept, orders: Orders) -> None:
    """Moves a parameter on, away from its average."""
    key = orders.key  # of other bits than those by which the step was rounded
    if isinstance(param, Rounded):
        key = stream_key(scalar(key, torch.int32), 0, 1, xp=torch)
    wide = compute_dtype(param)
    for values, p, x in blocks(raw(param), param, mean):
        (old,) = read([p], [wide])
        way = old - _near.numbers_of(values, x).to(wide)
        write([p], [torch.addcmul(old, way, orders.average_pull.to(wide))], key, orders.ok)
