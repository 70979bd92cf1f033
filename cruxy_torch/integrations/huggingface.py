"""Hugging Face: a `transformers.Trainer` with `CruxyOptimizer`, which is told each step's loss."""

import ast
import copy
import re
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from cruxy_torch._optimizers.cruxy import CruxyOptimizer

_REPLACED = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
_LOGGED = (
    "learning_rate", "phase", "curvature", "beta1", "beta2", "clip_threshold", "skipped_total",
)  # fmt: skip


class CruxyTrainer(Trainer):
    r"""`transformers.Trainer` with `CruxyOptimizer` in place of AdamW.

    It is called like the class it extends. `TrainingArguments` say what the optimizer gets:
    `learning_rate`, `weight_decay` (which biases and norms are spared), `adam_beta1`, `adam_beta2`
    (both at their defaults leave the betas to the optimizer's mode) and `adam_epsilon` in their
    usual places, and everything else in `optim_args`, such as `"mode=stability_v2"`,
    `"use_lion=True, use_gc=True"` or `"betas=(0.9, 0.95)"`. What a string cannot hold goes the
    `Trainer`'s own ways: `optimizer_cls_and_kwargs=(CruxyOptimizer, {"lr": 1e-4, "law": law})`, or
    `optimizers=(CruxyOptimizer(groups), None)`.

    **What it does beside.** Each step's loss reaches the controller: under gradient accumulation
    that of the whole batch, and under data parallelism its mean over the ranks. `max_grad_norm` is
    set to 0 in a copy of the arguments, since after clipping the sensors would see nothing but the
    threshold; the controller clips by a threshold of its own. What the controller decided last is
    logged beside the training loss, under the prefix `cruxy_`. Checkpoints hold the controller, and
    a run that is resumed continues bit by bit.

    To extend a subclass of `Trainer`, such as TRL's, name this class first:
    `class Mine(CruxyTrainer, SFTTrainer): pass`.

    Args:
        *args: those of `transformers.Trainer`.
        **kwargs: those of `transformers.Trainer`.

    Raises:
        ValueError: where `max_grad_norm` was set to anything but 0, `optim` names another
            optimizer, or the model is to run under DeepSpeed or FSDP 1, which show the optimizer
            neither raw gradients nor whole parameters; from `train` where `optim_args` is not a
            list of `name=value`.
        TypeError: where `optimizers` or `optimizer_cls_and_kwargs` hold another optimizer; from
            `train` where `optim_args` has a name that `CruxyOptimizer` does not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check(self)
        # The caller's own arguments may serve another trainer next, which does clip.
        self.args = copy.copy(self.args)
        self.args.max_grad_norm = 0.0

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: PreTrainedModel | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """`CruxyOptimizer` and what the training arguments say of it."""
        options: dict[str, Any] = {"lr": args.learning_rate, "eps": args.adam_epsilon}
        betas = (args.adam_beta1, args.adam_beta2)
        if betas != (type(args).adam_beta1, type(args).adam_beta2):
            # What nobody set must not overrule what the optimizer takes for its mode.
            options["betas"] = betas
        return CruxyOptimizer, options | _options(args.optim_args)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the optimizer where there is none, and joins the controllers of all ranks."""
        optimizer = super().create_optimizer(model)
        # FSDP 2 needs no group: its gradients name their mesh.
        if self.args.world_size > 1 and not self.is_fsdp_enabled:
            cruxy = self._cruxy()
            cruxy._process_group = cruxy._process_group or dist.group.WORLD
        return optimizer

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward of one micro-batch, whose loss the optimizer is told."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Micro-batches arrive as shares of the whole batch's loss; `observe` takes their mean.
        self._cruxy().observe(loss * self.current_gradient_accumulation_steps)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs what it is given, and beside a training loss what the controller decided."""
        if "loss" in logs and self.optimizer is not None:
            telemetry = self._cruxy().telemetry()
            logged = [name for name in _LOGGED if name in telemetry]
            logs = logs | {f"cruxy_{name}": telemetry[name] for name in logged}
        super().log(logs, start_time)

    def _cruxy(self) -> CruxyOptimizer:
        """The optimizer itself, which Accelerate wraps while it trains."""
        return cast(CruxyOptimizer, getattr(self.optimizer, "optimizer", self.optimizer))


def _check(trainer: CruxyTrainer) -> None:
    args = trainer.args
    if args.max_grad_norm not in (0, type(args).max_grad_norm):
        raise ValueError(
            f"max_grad_norm must be 0 or left out, got {args.max_grad_norm}; the controller clips "
            "by itself and has to see the gradients as they are."
        )
    if args.optim not in _REPLACED:
        raise ValueError(
            f"optim must be left out, got {OptimizerNames(args.optim).value!r}; this trainer uses "
            'CruxyOptimizer, and optim_args="use_lion=True" makes it Lion.'
        )
    given = trainer.optimizer
    if given is not None and not isinstance(given, CruxyOptimizer):
        raise TypeError(
            f"optimizers must hold a CruxyOptimizer, got {type(given).__name__}; "
            "transformers.Trainer takes every other."
        )
    chosen = trainer.optimizer_cls_and_kwargs
    if chosen is not None and chosen[0] is not CruxyOptimizer:
        raise TypeError(
            f"optimizer_cls_and_kwargs must name CruxyOptimizer, got {chosen[0]!r}; "
            "transformers.Trainer takes every other."
        )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.is_deepspeed_enabled or getattr(plugin, "fsdp_version", 2) == 1:
        name = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP 1"
        raise ValueError(
            f"the model must be replicated or sharded by FSDP 2, got {name}; "
            "fsdp=True in the training arguments is the latter."
        )


def _options(text: str | None) -> dict[str, Any]:
    """The value of `optim_args`: `name=value`, separated by commas."""
    options: dict[str, Any] = {}
    for part in filter(None, map(str.strip, re.split(r",(?![^(\[]*[)\]])", text or ""))):
        name, separator, value = (piece.strip() for piece in part.partition("="))
        if not (name and separator and value):
            raise ValueError(
                f"optim_args must be name=value, separated by commas, got {text!r}; "
                'write "use_lion=True, use_gc=True".'
            )
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options
