"""What a trainer is made of: a model on its device, an optimizer, hooks that release gradients."""

from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from cruxy_torch._controlled_optimizer import ControlledOptimizer
from cruxy_torch._memory.estimate import is_coded
from cruxy_torch._optimizers.axiom import AXIOM


def placed(model: nn.Module, device: str | torch.device | None) -> nn.Module:
    """The model on a device; one with weights in codes is where it was loaded to."""
    if device is None or any(map(is_coded, model.parameters())):
        return model
    return model.to(device)


def optimizer_of(optimizer: Any, model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    """The optimizer itself, or what makes one of the parameters that are trained.

    Raises:
        TypeError: where it is neither.
    """
    if isinstance(optimizer, Optimizer):
        return optimizer
    trained = [p for p in model.parameters() if p.requires_grad]
    if optimizer is None:
        return AXIOM(trained, lr=lr, weight_decay=weight_decay)
    made = optimizer(trained) if callable(optimizer) else optimizer
    if not isinstance(made, Optimizer):
        raise TypeError(
            "optimizer must be a torch optimizer or make one of a list of parameters, got "
            f"{made!r}; give for instance lambda params: CruxyOptimizer(params, lr=1e-3)."
        )
    return made


def releasing(optimizer: Optimizer) -> ControlledOptimizer:
    """The optimizer, which can release gradients.

    Raises:
        ValueError: where it cannot.
    """
    if not isinstance(optimizer, ControlledOptimizer):
        raise ValueError(
            "release must be left out for an optimizer that cannot update inside backward, got "
            f"{type(optimizer).__name__}; AXIOM, Cosmic and CruxyOptimizer can."
        )
    return optimizer
