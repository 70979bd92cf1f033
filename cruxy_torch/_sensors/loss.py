"""The loss of a step, as users hand it over: a number or a tensor, once or several times."""

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from cruxy_torch._distributed.shards import local

_LARGEST = torch.finfo(torch.float32).max


def scalar_loss(loss: Any) -> float | Tensor:
    """The loss as a number or a 0-d tensor without history.

    A number that float32 does not hold counts as none, which is NaN.

    Raises:
        TypeError: where it is neither a number nor a tensor.
        ValueError: where a tensor is not one real number.
    """
    if isinstance(loss, Tensor):
        if loss.numel() != 1 or loss.is_complex():
            raise ValueError(
                f"loss must be one real number, got {loss.dtype} of shape {tuple(loss.shape)}; "
                "reduce it first, for instance with .mean()."
            )
        return local(loss.detach()).reshape(())
    if not isinstance(loss, numbers.Real):
        loss = loss.item() if getattr(loss, "size", None) == 1 else loss  # another library's array
        if not isinstance(loss, numbers.Real):
            raise TypeError(
                f"loss must be a number or a tensor of one element, got {loss!r}; give what the "
                "model's loss function returned."
            )
    number: Any = loss
    return float(number) if -_LARGEST <= number <= _LARGEST else math.nan


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
