"""The mean loss on a loader, by the averages of the parameters, with the model left as it was."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from cruxy_torch._controlled_optimizer import ControlledOptimizer
from cruxy_torch.training.batches import moved
from cruxy_torch.training.losses import Loss


def mean_loss(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Loss,
    device: torch.device,
    max_batches: int | None,
) -> float:
    """The loss over all that counts in the loader: tokens, else examples.

    Raises:
        ValueError: where nothing counts.
    """
    total, count = 0.0, 0.0
    for number, batch in enumerate(loader):
        if number == max_batches:
            break
        batch = moved(batch, device)
        size = float(loss.count(batch))
        if size:
            total += size * float(loss(model, batch))
            count += size
    if not count:
        raise ValueError(
            "val_loader must have something to evaluate, got no batch or no label that counts; "
            "leave it out where there is none."
        )
    return total / count


def averages(optimizer: Optimizer) -> contextlib.AbstractContextManager[Any]:
    """`optimizer.averaged()` where it keeps averages; else a block in which nothing changes."""
    keeps = any(group.get("averaging") is not None for group in optimizer.param_groups)
    if isinstance(optimizer, ControlledOptimizer) and keeps:
        return optimizer.averaged()
    return contextlib.nullcontext()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block nothing is trained; each module is then as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
