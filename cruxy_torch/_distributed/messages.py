"""The all-gather of one message a rank, under the name that this version of PyTorch has for it."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
"""Since PyTorch 2.13 the older name warns."""


def gathered(message: Tensor, group: Any, *, wait: bool = True) -> tuple[Tensor, Any]:
    """The message of every rank.

    Args:
        message: of this rank, one axis.
        group: of the ranks; `None` for all processes.
        wait: for them to be there.

    Returns:
        A row a rank, and what to wait for where that was not done.
    """
    rows = message.new_empty((dist.get_world_size(group), len(message)))
    work = getattr(dist, GATHER)(rows, message[None], group=group, async_op=not wait)
    return rows, work
