"""Our optimizers in the comparison in PyTorch, by the names that they have in JAX."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks._rates import STARTS, WEIGHT_DECAY
from benchmarks._torch.activations import compressed
from benchmarks._torch.optimizers import LOW_BIT, ORIGINAL, PEERS, SOURCES, Groups, TorchOptimizer
from cruxy_torch import AXIOM, Cosmic, CruxyOptimizer, param_groups

OUR_SOURCES = (
    *SOURCES,
    "benchmarks/_torch/our_optimizers.py",
    *("cruxy_control/**/*.py", "cruxy_exact/**/*.py"),
    *("cruxy_torch/**/*.py", "cruxy_torch/**/*.[ch]"),
)


def _controlled(
    label: str, scale: float = 1.0, kind: type[Any] = CruxyOptimizer, **options: Any
) -> TorchOptimizer:
    def make(groups: Groups, rate: float) -> Optimizer:
        return kind(groups, lr=rate, **options)

    default = 1e-3 * scale
    return TorchOptimizer(label, make, scale, takes_loss=True, default=default, sources=OUR_SOURCES)


def _lion(label: str, **options: Any) -> TorchOptimizer:
    return _controlled(label, 0.1, use_lion=True, betas=(0.9, 0.99), **options)


def _driving(label: str, **options: Any) -> TorchOptimizer:
    entry = _controlled(label, mode="self_driving", **options)
    return entry._replace(averaged=lambda optimizer: optimizer.averaged(), grid=STARTS)


def _by_role(model: nn.Module) -> Groups:
    """The same decay as everybody's; what each parameter is tells Muon which matrices are its."""
    by_role = param_groups(model, lr=1.0, weight_decay=WEIGHT_DECAY, decays={"position": 1.0})
    for group in by_role:
        del group["lr"]  # the run's
    return by_role


def _muon(label: str, **options: Any) -> TorchOptimizer:
    return _driving(label, direction="muon", **options)._replace(grouped=_by_role)


def _to_zero(step: int, steps: int) -> float:
    return max(0.0, 1.0 - step / steps)


CONTROLLED = {
    "meta3": _controlled("Meta3"),
    "meta_lion": _lion("Meta-Lion"),
    "stability_v1": _controlled("Stability v1", mode="stability_v1"),
    "stability_v2": _controlled("Stability v2", mode="stability_v2"),
}
"""Ours."""

SELF_DRIVING = {
    "self_driving": _driving("Self-driving"),
    "self_driving-lion": _driving("Self-driving Lion", use_lion=True)._replace(default=1e-4),
    "self_driving-no-average": _controlled(
        "Self-driving without average", mode="self_driving", averaging=None
    )._replace(grid=STARTS),
    "self_driving-muon": _muon("Self-driving Muon"),
}
"""Ours without a rate; the grid is where they start."""

SCHEDULED = {
    "self_driving-muon-linear": _muon("Self-driving Muon, linear to 0")._replace(schedule=_to_zero),
    "self_driving-muon-plain-linear": _muon(
        "Self-driving Muon, no interpolation, linear to 0", interpolation=0.0
    )._replace(schedule=_to_zero),
}
"""The same under a scheduler of PyTorch, of which they do not know that it is coming."""

COMPACT = {
    "meta_lion-bfloat16": _lion("Meta-Lion, bfloat16", momentum_dtype=torch.bfloat16),
    "meta3-8bit": _controlled("Meta3, 8 bits", state_bits=8),
    "meta3-4bit": _controlled("Meta3, 4 bits", state_bits=4),
    "meta_lion-8bit": _lion("Meta-Lion, 8 bits", state_bits=8),
    "meta_lion-4bit": _lion("Meta-Lion, 4 bits", state_bits=4),
    "axiom": _controlled("AXIOM", kind=AXIOM),
    "axiom-momentum": _controlled("AXIOM, 4-bit momentum", kind=AXIOM, momentum=0.9),
    "cosmic-256KB": _controlled("COSMIC, 256 KB", kind=Cosmic, state_budget="256KB"),
}
"""Ours with a smaller state; COSMIC plans its tiers anew every 100 steps."""

OURS = CONTROLLED | SELF_DRIVING | COMPACT

ACTIVATIONS = {
    f"{name}-activations{bits}": compressed(CONTROLLED[name], bits)
    for name in ("meta3", "meta_lion")
    for bits in (8, 4)
}
"""Ours with activations in fewer bits."""

OPTIMIZERS: dict[str, TorchOptimizer] = OURS | SCHEDULED | ACTIVATIONS | ORIGINAL | PEERS | LOW_BIT
"""Every optimizer by name."""
