"""The loss of a step, as users hand it over: a number or a tensor, once or several times."""

import math

import torch
from torch import Tensor

from cruxy_torch._distributed.shards import local


def mean_loss(losses: list[float | Tensor], device: torch.device) -> Tensor:
    """The mean as a float32 scalar on the device, NaN of nothing."""
    # A number is filled in, not copied from the host, so it does not wait for the device.
    each = [
        loss.to(device, torch.float32, non_blocking=True)
        if isinstance(loss, Tensor)
        else torch.full((), loss, dtype=torch.float32, device=device)
        for loss in losses or [math.nan]
    ]
    return torch.stack(each).mean() if len(each) > 1 else each[0]


def scalar_loss(loss: float | Tensor) -> float | Tensor:
    """The loss as a number or a 0-d tensor without history."""
    if not isinstance(loss, Tensor):
        return float(loss)
    if loss.numel() != 1 or loss.is_complex():
        raise ValueError(
            f"loss must be one real number, got {loss.dtype} of shape {tuple(loss.shape)}; "
            "reduce it first, for instance with .mean()."
        )
    return local(loss.detach()).reshape(())
