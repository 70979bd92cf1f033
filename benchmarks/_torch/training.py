"""Training runs in PyTorch, on the twins of the workloads."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from benchmarks._runs import Record, Task
from benchmarks._torch.optimizers import TorchOptimizer, groups
from benchmarks._torch.our_optimizers import OPTIMIZERS
from benchmarks._torch.workloads.weights import copy_weights, load_twin
from benchmarks.workloads import load
from cruxy_torch import state_bytes


def train(task: Task) -> Record:
    """Trains the twin of a workload from its weights and on its batches.

    Args:
        task: of the framework "torch", without a fault.

    Raises:
        ValueError: if the workload has no twin, the optimizer's package is not installed, or there
            is a fault: those are struck in JAX alone.
    """
    if task.fault != "none":
        raise ValueError(f"a fault must be 'none' in PyTorch, got {task.fault!r}; train in JAX.")
    began = time.perf_counter()
    entry = OPTIMIZERS[task.optimizer]
    workload, twin = load(task.workload, task.data), load_twin(task.workload, task.data)
    torch.manual_seed(task.seed)  # for optimizers that round at random
    model = twin.make()
    copy_weights(workload.init(task.seed), model)
    optimizer: Any = entry.make(groups(model), task.rate)
    schedule = _schedule(entry, optimizer, task)

    def figure() -> float:
        with entry.averaged(optimizer):
            value = twin.held_out(model)
        return value if math.isfinite(value) else math.nan

    start = figure()
    held_out: list[float] = []
    losses: list[Tensor] = []
    for taken, batch in zip(range(1, task.steps + 1), workload.batches(task.seed), strict=False):
        optimizer.zero_grad()
        loss = twin.loss(model, batch)
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
    """The rate of every step as optax computes it, set by PyTorch's own scheduler."""
    if entry.schedule is None:
        return None
    factors = np.asarray(jax.vmap(entry.schedule(1.0, task.steps))(jnp.arange(task.steps + 1)))
    return LambdaLR(optimizer, lambda step: float(factors[step]))


def _finite(model: nn.Module, optimizer: Optimizer) -> bool:
    kept = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [
        value.dequantize() if is_traceable_wrapper_subclass(value) else value
        for value in (*model.parameters(), *kept)
        if isinstance(value, Tensor)
    ]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
