"""Notices, once and without a collective, that replicas steer by losses of their own."""

import itertools
import warnings

import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_torch._distributed.shards import in_processes
from cruxy_torch._law_state import REPORT

_numbers = itertools.count()
"""Replicas make their optimizers in the same order."""

STEPS = 10
"""Looks at what the others have put down, before it gives up."""


class ReplicaCheck:
    """Compares the first step of this rank with that of the others.

    Equal gradients and unequal losses are those of replicas whose controllers will drift apart.
    Each rank puts its two numbers into the store that the processes met through, and looks for
    those of the others in its next steps: nobody waits, whatever the other ranks do.
    """

    def __init__(self) -> None:
        self._left, self._key = STEPS, ""
        self._own: tuple[float, float] | None = None

    def look(self, report: Tensor) -> None:
        """Takes part with one step's report; reads it on the host in the first step alone."""
        if not self._left or not in_processes() or _capturing(report):
            return
        self._left -= 1
        store = dist.distributed_c10d._get_default_store()
        if self._own is None:
            numbers = dict(zip(REPORT, report.tolist(), strict=True))
            self._own = numbers["grad_norm"], numbers["loss"]
            self._key = f"cruxy_torch/replicas/{next(_numbers)}"
            store.set(f"{self._key}/{dist.get_rank()}", " ".join(map(float.hex, self._own)))
            return
        keys = [f"{self._key}/{rank}" for rank in range(dist.get_world_size())]
        if not store.check(keys):
            return
        self._left = 0
        texts = [store.get(key).decode() for key in keys]
        pairs = {tuple(map(float.fromhex, text.split())) for text in texts}
        if len({norm for norm, _ in pairs}) == 1 and len(pairs) > 1:
            warnings.warn(
                "ranks with the same gradients passed losses of their own, so that their "
                "controllers will drift apart; give process_group=torch.distributed.group.WORLD, "
                "or reduce the loss before step().",
                stacklevel=4,
            )


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
