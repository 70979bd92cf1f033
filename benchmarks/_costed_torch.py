"""The PyTorch optimizers whose costs are measured, and the step that trains a twin with one."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks._costed import Costed
from benchmarks._optimizers import RATES
from benchmarks._optimizers_torch import CONTROLLED, LOW_BIT, ORIGINAL, PEERS, groups
from benchmarks._optimizers_torch import OPTIMIZERS as TRAINED
from benchmarks.workloads.torch_twins import Twin
from cruxy_torch import CruxyOptimizer

# Costs do not depend on the rate; this is an ordinary one.
_RATE = RATES[1]


def _make(name: str, model: nn.Module) -> Optimizer:
    entry = TRAINED[name]
    made: Any = entry.make(groups(model), entry.scale * _RATE)
    if entry.averaged:
        made.train()
    return made


def _check(name: str) -> None:
    if name.startswith("bnb") and not torch.cuda.is_available():
        raise ValueError(f"{name} needs a GPU; leave it out, or run where there is one.")
    _make(name, nn.Linear(1, 1))


def _trained(name: str) -> Costed:
    return Costed(
        TRAINED[name].label.removesuffix(", constant"),
        functools.partial(_make, name),
        ours=name in CONTROLLED,
        check=functools.partial(_check, name),
    )


def _ours(label: str, rate: float = _RATE, **options: Any) -> Costed:
    return Costed(label, lambda model: CruxyOptimizer(groups(model), lr=rate, **options), ours=True)


def _lion(label: str, **options: Any) -> Costed:
    return _ours(label, 0.1 * _RATE, use_lion=True, betas=(0.9, 0.99), **options)


SELF_DRIVING = {
    "self_driving": _ours("Self-driving", mode="self_driving"),
    "self_driving-lion": _ours("Self-driving Lion", mode="self_driving", use_lion=True),
    "self_driving-no-average": _ours(
        "Self-driving without average", mode="self_driving", averaging=None
    ),
}
"""Ours without a rate."""

COMPACT = {
    "meta_lion-bfloat16": _lion("Meta-Lion, bfloat16", momentum_dtype=torch.bfloat16),
    "meta3-8bit": _ours("Meta3, 8 bits", state_bits=8),
    "meta3-4bit": _ours("Meta3, 4 bits", state_bits=4),
    "meta_lion-8bit": _lion("Meta-Lion, 8 bits", state_bits=8),
    "meta_lion-4bit": _lion("Meta-Lion, 4 bits", state_bits=4),
}
"""Ours with a smaller state."""

OPTIMIZERS: dict[str, Costed] = (
    {name: _trained(name) for name in ("adamw", *CONTROLLED)}
    | SELF_DRIVING
    | COMPACT
    | {name: _trained(name) for name in (*PEERS, *ORIGINAL, *LOW_BIT) if "-cosine" not in name}
)
"""Every optimizer by name; `make` takes a model, and `adamw`, fused, is the reference."""


def step_of(optimizer: Optimizer) -> Callable[[Tensor], Any]:
    """The optimizer's step as a function of the loss, which it is given where it takes one."""
    step: Callable[..., Any] = optimizer.step
    if "loss" in inspect.signature(step).parameters:
        return lambda loss: step(loss=loss)
    return lambda loss: step()


def training_step(twin: Twin, model: nn.Module, optimizer: Optimizer) -> Callable[[Any], None]:
    """One step of training, from a batch of the workload."""
    step = step_of(optimizer)

    def train(batch: Any) -> None:
        optimizer.zero_grad()
        loss = twin.loss(model, batch)
        loss.backward()
        step(loss.detach())

    return train
