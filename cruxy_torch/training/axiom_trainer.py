"""`AXIOM_Trainer`: the trainer with AXIOM and released gradients, by the names of its seed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cruxy_torch._optimizers.axiom import AXIOM
from cruxy_torch.training.trainer import Trainer


class AXIOM_Trainer(Trainer):  # noqa: N801  the name that scripts import
    """`Trainer` with `AXIOM` and released gradients, for scripts written for a class of this name.

    Args:
        model: the model.
        train_loader: see `Trainer`.
        val_loader: likewise.
        lr: learning rate of `AXIOM`.
        weight_decay: its weight decay.
        max_grad_norm: its bound on the norm of each tensor's gradient; `None` for none.
        eval_interval: see `Trainer`, as all that follow.
        log_interval: see there.
        checkpoint_interval: see there.
        checkpoint_dir: see there.
        save_results: see there.
        results_prefix: see there.
        device: see there.
        **options: further arguments of `Trainer`; not `optimizer`.

    Raises:
        ValueError: see `Trainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
        lr: float = 5e-4,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = None,
        eval_interval: int = 200,
        log_interval: int = 100,
        checkpoint_interval: int = 500,
        checkpoint_dir: str | Path = "checkpoints",
        save_results: bool = True,
        results_prefix: str | Path = "axiom",
        device: str | torch.device | None = None,
        **options: Any,
    ) -> None:
        def make(params: list[nn.Parameter]) -> AXIOM:
            return AXIOM(params, lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm)

        super().__init__(
            model,
            train_loader,
            val_loader,
            make,
            release=options.pop("release", True),
            eval_interval=eval_interval,
            log_interval=log_interval,
            checkpoint_interval=checkpoint_interval,
            checkpoint_dir=checkpoint_dir,
            save_results=save_results,
            results_prefix=results_prefix,
            device=device,
            **options,
        )
