"""Averages in 16 and 8 bits: their lowest digits, read beside the parameters (`NearCode`)."""

from typing import Any

import torch
from torch import Tensor

from cruxy_exact.random_bits import random_bits
from cruxy_torch._kept import Coded, compute_dtype, in_blocks, numbers
from cruxy_torch._orders import Orders


def begin(param: Tensor, mean: Coded) -> None:
    """Makes an average that of the parameter alone."""
    near = in_blocks(param, compute_dtype(param))
    largest = near.abs().amax(1, keepdim=True).to(torch.float32)
    reach = mean.code.first_reach(largest, xp=torch)
    grid = mean.code.grid(reach, torch.ones_like(reach), xp=torch)
    _keep(mean, torch.zeros_like(near), near, grid)


def put(param: Tensor, mean: Coded, value: Tensor) -> None:
    """Makes an average this value, to the nearest step."""
    near = in_blocks(param, compute_dtype(param))
    offset = in_blocks(value, near.dtype) - near
    reach = offset.abs().amax(1, keepdim=True).to(torch.float32)
    grid = mean.code.grid(reach, torch.zeros_like(reach), xp=torch)
    _keep(mean, offset, near, grid)


def _keep(mean: Coded, offset: Tensor, near: Tensor, grid: Tensor) -> None:
    mean.codes.copy_(mean.code.encode(offset, near, grid, 0.5, xp=torch))
    mean.scales.copy_(grid[:, 0])


def value(param: Tensor, mean: Coded) -> Tensor:
    """The average, like the parameter; float32, or float64 of float64."""
    near = in_blocks(param, compute_dtype(param))
    grid = mean.scales.to(near.dtype)[:, None]
    values = near + mean.code.offset(mean.codes, near, grid, xp=torch)
    return values.view(-1)[: param.numel()].view(param.shape)


def numbers_of(param: Tensor, mean: Any) -> Tensor:
    """An average that may be coded, and then is read beside its parameter, as numbers."""
    return value(param, mean) if isinstance(mean, Coded) else mean


def move(param: Tensor, mean: Coded, orders: Orders) -> None:
    """Moves an average its share of the way to the parameter, which has just taken its step.

    Args:
        param: after the step, as it really is.
        mean: read beside it. A parameter that stood still until now moves by about the rate, and
            the average has to be within reach of that.
        orders: on the device of the parameter.
    """
    code, near = mean.code, in_blocks(param, compute_dtype(param))
    grid = mean.scales.to(torch.float32)[:, None]
    offset = code.offset(mean.codes, near, grid.to(near.dtype), xp=torch)
    reach = offset.abs().amax(1, keepdim=True).to(torch.float32)
    grid = code.grid(torch.maximum(reach, orders.rate.to(torch.float32)), grid, xp=torch)
    own = numbers(near.numel(), mean.first, near.device).view(near.shape)
    noise = code.noise(random_bits(orders.key, own), xp=torch)
    offset = offset - orders.average_weight.to(near.dtype) * offset
    codes = code.encode(offset, near, grid.to(near.dtype), noise, xp=torch)
    for target, new in ((mean.codes, codes), (mean.scales, grid[:, 0].to(torch.bfloat16))):
        target.copy_(torch.where(orders.ok, new, target))
