"""The PyTorch optimizers whose costs are measured, and the step that trains with one."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks._measured_optimizers import MeasuredOptimizer
from benchmarks._rates import RATES
from benchmarks._torch.optimizers import LOW_BIT, ORIGINAL, PEERS
from benchmarks._torch.our_optimizers import OPTIMIZERS as TRAINED
from benchmarks._torch.our_optimizers import OURS
from benchmarks.workloads import Workload

# Costs do not depend on the rate; this is an ordinary one.
_RATE = RATES[1]


def _make(name: str, model: nn.Module) -> Optimizer:
    entry = TRAINED[name]
    return entry.make(entry.grouped(model), entry.scale * _RATE)


def _check(name: str) -> None:
    if name.startswith("bitsandbytes") and not torch.cuda.is_available():
        raise ValueError(f"{name} needs a GPU; leave it out, or run where there is one.")
    _make(name, nn.Linear(64, 64))  # large enough for codes


def _trained(name: str) -> MeasuredOptimizer:
    return MeasuredOptimizer(
        TRAINED[name].label.removesuffix(", constant"),
        functools.partial(_make, name),
        ours=name in OURS,
        check=functools.partial(_check, name),
    )


OPTIMIZERS: dict[str, MeasuredOptimizer] = {
    name: _trained(name)
    for name in ("adamw", *OURS, *PEERS, *ORIGINAL, *LOW_BIT)
    if "-cosine" not in name
}
"""Every optimizer by name; `make` takes a model, and `adamw`, fused, is the reference."""


def step_of(optimizer: Optimizer) -> Callable[[Tensor], Any]:
    """The optimizer's step as a function of the loss, which it is given where it takes one."""
    step: Callable[..., Any] = optimizer.step
    if "loss" in inspect.signature(step).parameters:
        return lambda loss: step(loss=loss)
    return lambda loss: step()


def training_step(
    workload: Workload, model: nn.Module, optimizer: Optimizer
) -> Callable[[Any], None]:
    """One step of training, from a batch of the workload."""
    step = step_of(optimizer)

    def train(batch: Any) -> None:
        optimizer.zero_grad()
        loss = workload.loss(model, batch)
        loss.backward()
        step(loss.detach())

    return train
