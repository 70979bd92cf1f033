"""Training runs in PyTorch, one after the other."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from benchmarks._runs import Record, Task
from benchmarks._torch.optimizers import TorchOptimizer
from benchmarks._torch.our_optimizers import OPTIMIZERS
from benchmarks.workloads import load
from cruxy_torch import state_bytes


def train(tasks: Sequence[Task]) -> list[Record]:
    """Runs tasks.

    Args:
        tasks: of the framework "torch", without a fault.

    Returns:
        A record each, in order.

    Raises:
        ValueError: if a workload is JAX's alone, an optimizer's package is not installed, or there
            is a fault: those are struck in JAX alone.
    """
    return [_train(task) for task in tasks]


def _train(task: Task) -> Record:
    if task.fault != "none":
        raise ValueError(f"a fault must be 'none' in PyTorch, got {task.fault!r}; train in JAX.")
    began = time.perf_counter()
    entry = OPTIMIZERS[task.optimizer]
    workload = load(task.workload, task.data, "torch")
    torch.manual_seed(task.seed)  # for optimizers that round at random
    model = workload.init(task.seed)
    optimizer: Any = entry.make(entry.grouped(model), task.rate)
    schedule = _schedule(entry, optimizer, task)

    def figure() -> float:
        with entry.averaged(optimizer):
            value = workload.held_out(model)
        return value if math.isfinite(value) else math.nan

    start = figure()
    held_out: list[float] = []
    losses: list[Tensor] = []
    for taken, batch in zip(range(1, task.steps + 1), workload.batches(task.seed), strict=False):
        optimizer.zero_grad()
        with entry.forward(model, task.seed, taken):
            loss = workload.loss(model, batch)
        loss.backward()
        losses.append(loss.detach())
        optimizer.step(**({"loss": losses[-1]} if entry.takes_loss else {}))
        if schedule is not None:
            schedule.step()
        if taken in task.evaluate_at:
            held_out.append(figure())
    parameters = sum(param.numel() for param in model.parameters())
    controlled = hasattr(optimizer, "telemetry")
    return Record(
        start=start,
        held_out=tuple(held_out),
        losses=tuple(torch.stack(losses).tolist()),
        finite=_finite(model, optimizer),
        skipped=int(optimizer.telemetry()["skipped_total"]) if controlled else None,
        state_bytes_per_parameter=state_bytes(optimizer) / parameters,
        seconds=time.perf_counter() - began,
    )


def _schedule(entry: TorchOptimizer, optimizer: Optimizer, task: Task) -> LambdaLR | None:
    """What sets the rate of every step."""
    schedule = entry.schedule
    if schedule is None:
        return None
    return LambdaLR(optimizer, lambda step: schedule(step, task.steps))


def _finite(model: nn.Module, optimizer: Optimizer) -> bool:
    kept = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [
        value.dequantize() if is_traceable_wrapper_subclass(value) else value
        for value in (*model.parameters(), *kept)
        if isinstance(value, Tensor)
    ]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
