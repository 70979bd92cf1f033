"""The optimizers compared in PyTorch: ours, the original `cruxy`, and what people use.

As in JAX, all decay matrices alone by 0.1, the rate is the one knob, and the rest is as their
authors set it. A package is asked for only when its optimizer is made.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import optax
import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks._optimizers import RATES, WEIGHT_DECAY, warm_up_cosine
from cruxy_torch import CruxyOptimizer

Groups = list[dict[str, Any]]


class TorchOptimizer(NamedTuple):
    """An optimizer to compare.

    Attributes:
        label: for tables and plots.
        make: from parameter groups and the rate.
        scale: of its grid of rates to `RATES`, as in JAX.
        schedule: from the rate and the number of steps, `None` for a constant rate.
        takes_loss: whether `step` is given the loss.
        averaged: whether `train()` and `eval()` of the optimizer switch between the parameters to
            take gradients at and those to evaluate at.
        sources: patterns, from the repository's root, of the files that define it.
    """

    label: str
    make: Callable[[Groups, float], Optimizer]
    scale: float = 1.0
    schedule: Callable[[float, int], optax.Schedule] | None = None
    takes_loss: bool = False
    averaged: bool = False
    sources: tuple[str, ...] = ("benchmarks/_optimizers*.py",)

    def rates(self) -> tuple[float, ...]:
        """Its grid."""
        return tuple(float(f"{self.scale * rate:.6g}") for rate in RATES)


def groups(model: nn.Module) -> Groups:
    """Weight decay is for matrices; gains and biases are left alone."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


def _ours(label: str, scale: float = 1.0, **options: Any) -> TorchOptimizer:
    return TorchOptimizer(
        label,
        lambda groups, rate: CruxyOptimizer(groups, lr=rate, **options),
        scale,
        takes_loss=True,
        sources=("benchmarks/_optimizers*.py", "cruxy_control/*.py", "cruxy_torch/*"),
    )


def _adamw(label: str, **options: Any) -> TorchOptimizer:
    return TorchOptimizer(label, lambda groups, rate: torch.optim.AdamW(groups, lr=rate, **options))


def _peer(label: str, place: str, extra: str = "bench", **options: Any) -> TorchOptimizer:
    """An optimizer of another package.

    Args:
        label: for tables and plots.
        place: the module and the name of the class.
        extra: of this project, that installs the package.
        **options: further fields of the entry; `arguments` are given to the class.
    """
    module, _, name = place.rpartition(".")
    arguments = options.pop("arguments", {})

    def make(groups: Groups, rate: float) -> Optimizer:
        try:
            package = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{label} needs the package {error.name}, which is not installed; "
                f"run pip install -e '.[{extra}]'."
            ) from error
        return getattr(package, name)(groups, lr=rate, **arguments)

    return TorchOptimizer(label, make, **options)


CONTROLLED = {
    "meta3": _ours("Meta3"),
    "meta_lion": _ours("Meta-Lion", scale=0.1, use_lion=True, betas=(0.9, 0.99)),
    "stability_v1": _ours("Stability v1", mode="stability_v1"),
    "stability_v2": _ours("Stability v2", mode="stability_v2"),
}
"""Ours."""

# It takes no rate above 1e-2, whatever is set.
ORIGINAL = {
    "cruxy-meta3": _peer("cruxy 2.1.0, Meta3", "cruxy.CruxyOptimizer", takes_loss=True),
    "cruxy-meta_lion": _peer(
        "cruxy 2.1.0, Meta-Lion",
        "cruxy.CruxyOptimizer",
        "test",
        scale=0.1,
        takes_loss=True,
        arguments={"use_lion": True, "betas": (0.9, 0.99)},
    ),
}
"""The original."""

PEERS = {
    "adamw": _adamw("AdamW fused, constant", fused=True),
    "adamw-cosine": _adamw("AdamW fused, warm-up and cosine", fused=True)._replace(
        schedule=warm_up_cosine
    ),
    "adamw-foreach": _adamw("AdamW foreach, constant", foreach=True),
    "schedule-free": _peer("Schedule-Free AdamW", "schedulefree.AdamWScheduleFree", averaged=True),
    "prodigy": _peer("Prodigy", "prodigyopt.Prodigy", scale=100.0),
    "stable-adamw": _peer("StableAdamW", "pytorch_optimizer.StableAdamW"),
    "adagc": _peer("AdaGC", "pytorch_optimizer.AdaGC"),
}
"""What people use."""

LOW_BIT = {
    "torchao-adamw-8bit": _peer("torchao AdamW8bit", "torchao.optim.AdamW8bit", "low-bit"),
    "torchao-adamw-4bit": _peer("torchao AdamW4bit", "torchao.optim.AdamW4bit", "low-bit"),
    "bnb-adamw-8bit": _peer("bitsandbytes AdamW8bit", "bitsandbytes.optim.AdamW8bit", "low-bit"),
    "bnb-lion-8bit": _peer(
        "bitsandbytes Lion8bit", "bitsandbytes.optim.Lion8bit", "low-bit", scale=0.1
    ),
}
"""With states of few bits, in parameters of 4,096 elements or more."""

OPTIMIZERS: dict[str, TorchOptimizer] = CONTROLLED | ORIGINAL | PEERS | LOW_BIT
"""Every optimizer by name."""
