"""Training runs in PyTorch whose activations are kept in 8 or 4 bits for the backward pass."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks._runs import Record, Task
from benchmarks._torch.compressed_run import CompressedRun
from benchmarks._torch.optimizers import groups
from benchmarks._torch.our_optimizers import ACTIVATIONS
from benchmarks.workloads import load
from cruxy_torch import compress_activations, state_bytes


def train(tasks: Sequence[Task]) -> list[Record]:
    """Runs tasks whose optimizer is one of `ACTIVATIONS`, one after the other.

    Args:
        tasks: of the framework "torch", without a fault.

    Returns:
        A record each, in order.

    Raises:
        ValueError: if a workload is JAX's alone, or there is a fault.
    """
    return [_train(task, ACTIVATIONS[task.optimizer]) for task in tasks]


def _train(task: Task, entry: CompressedRun) -> Record:
    if task.fault != "none":
        raise ValueError(f"a fault must be 'none' in PyTorch, got {task.fault!r}; train in JAX.")
    began = time.perf_counter()
    workload = load(task.workload, task.data, "torch")
    model = workload.init(task.seed)
    optimizer: Any = entry.make(groups(model), task.rate)

    def figure() -> float:
        with entry.averaged(optimizer):
            value = workload.held_out(model)
        return value if math.isfinite(value) else math.nan

    start = figure()
    held_out: list[float] = []
    losses: list[Tensor] = []
    for taken, batch in zip(range(1, task.steps + 1), workload.batches(task.seed), strict=False):
        optimizer.zero_grad()
        with compress_activations(model, entry.bits, seed=task.seed, step=taken):
            loss = workload.loss(model, batch)
        loss.backward()
        losses.append(loss.detach())
        optimizer.step(loss=losses[-1])
        if taken in task.evaluate_at:
            held_out.append(figure())
    return Record(
        start=start,
        held_out=tuple(held_out),
        losses=tuple(torch.stack(losses).tolist()),
        finite=all(bool(param.isfinite().all()) for param in model.parameters()),
        skipped=int(optimizer.telemetry()["skipped_total"]),
        state_bytes_per_parameter=state_bytes(optimizer)
        / sum(p.numel() for p in model.parameters()),
        seconds=time.perf_counter() - began,
    )
