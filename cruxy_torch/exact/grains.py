"""Gradients of micro-batches and devices added so that no cut and no order can matter."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cruxy_exact import accumulate
from cruxy_exact.accumulate import Grains
from cruxy_exact.arithmetic import f32, mul, settle


class GrainAccumulator:
    """The exact sum of the gradients of grains, over micro-batches and processes.

    A grain is a fixed number of samples, the least that a batch may be cut into. Its loss is a sum
    over them. Run backward for a grain, `add` it, and `finish` with the count of the whole batch:

        for grain in mine:
            exact.set_step(model, step, grain.number)
            loss = loss_of(model, grain)
            loss.backward()
            grains.add(loss)
        loss = grains.finish(count=samples_in_the_whole_batch)
        optimizer.step()
        optimizer.zero_grad()

    Under `DistributedDataParallel` run the backward passes inside `no_sync()`; a bare model needs
    nothing. Every process of the group has to call `finish`. It costs 16 bytes a parameter.

    Args:
        params: parameters, or a module, of which those that require a gradient are taken.

    Raises:
        ValueError: where there is none.
    """

    def __init__(self, params: Iterable[nn.Parameter] | nn.Module) -> None:
        found = params.parameters() if isinstance(params, nn.Module) else params
        self.params = [p for p in found if p.requires_grad]
        if not self.params:
            raise ValueError("GrainAccumulator needs parameters that require a gradient, got none.")
        self._sums: list[Grains] | None = None

    def _empty(self) -> list[Grains]:
        """No grains of each parameter and of the loss."""
        first = self.params[0]
        zero = torch.zeros((1,), dtype=torch.float32, device=first.device)
        return [accumulate.empty(x, xp=torch) for x in (*self.params, zero)]

    @torch.no_grad()
    def add(self, loss: Tensor | None = None) -> None:
        """Adds the gradients of one grain and clears them.

        Args:
            loss: of the grain, float32 `()`, where the exact loss of the batch is wanted.
        """
        if self._sums is None:
            self._sums = self._empty()
        if loss is not None:
            part = settle(loss.detach().reshape(1), xp=torch)
            self._sums[-1] = accumulate.push(self._sums[-1], part, xp=torch)
        for i, p in enumerate(self.params):
            if p.grad is not None:
                g = settle(p.grad, xp=torch)
                self._sums[i] = accumulate.push(self._sums[i], g, xp=torch)
                p.grad = None

    @torch.no_grad()
    def finish(self, count: int = 1, group: Any = None) -> Tensor:
        """Gives every parameter its gradient: the sum over all grains, over `count`.

        Args:
            count: what the sum is divided by, as the samples or tokens in the whole batch; it is
                multiplied with the float32 reciprocal.
            group: processes; all of them at first. Without `torch.distributed` there is one.

        Returns:
            The losses that `add` was given in all processes, likewise; float32 `()`, 0 of none. A
            control law that senses the loss takes this one: no cut of the batch changes its bits.

        Raises:
            ValueError: where `count` is below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count!r}; 1 leaves the sum.")
        sums = self._sums or self._empty()
        self._sums = None
        if dist.is_available() and dist.is_initialized():
            sums = reduced(sums, group)
        share = f32(1 / count)
        means = [mul(accumulate.value(grains, xp=torch), share, xp=torch) for grains in sums]
        for p, mean in zip(self.params, means[:-1], strict=True):
            p.grad = mean
        return means[-1][0]


def reduced(sums: list[Grains], group: Any = None) -> list[Grains]:
    """The sums of all processes: the largest bin of each tensor, and integers added."""
    bins = torch.cat([grains.bin for grains in sums])
    dist.all_reduce(bins, dist.ReduceOp.MAX, group)
    places = bins.split(1)
    pairs = zip(sums, places, strict=True)
    raised = [accumulate.raised(grains, place, xp=torch) for grains, place in pairs]
    flat = torch.cat([part.reshape(-1) for grains in raised for part in (grains.high, grains.low)])
    dist.all_reduce(flat, dist.ReduceOp.SUM, group)
    parts = iter(flat.split([grains.high.numel() for grains in raised for _ in range(2)]))
    return [
        Grains(next(parts).view(grains.high.shape), next(parts).view(grains.high.shape), place)
        for grains, place in zip(raised, places, strict=True)
    ]


def ddp_hook(group: Any, bucket: Any) -> torch.futures.Future[Tensor]:
    """A communication hook of `DistributedDataParallel`: each process's batch is one grain.

    The gradients become the exact sum over processes, not their mean. It is the same for any order
    of the processes; to change their number without changing bits, take `GrainAccumulator`.

    Args:
        group: as the hook's state: the processes, or `None` for all.
        bucket: what DDP hands over, a `torch.distributed.GradBucket`.

    Examples:
        >>> from torch.nn.parallel import DistributedDataParallel
        >>> def wrap(model):
        ...     model = DistributedDataParallel(model)
        ...     model.register_comm_hook(None, ddp_hook)
        ...     return model
    """
    with torch.no_grad():
        gradients = bucket.gradients()
        sums = [
            accumulate.push(accumulate.empty(g, xp=torch), settle(g, xp=torch), xp=torch)
            for g in gradients
        ]
        for g, grains in zip(gradients, reduced(sums, group), strict=True):
            g.copy_(accumulate.value(grains, xp=torch))
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
