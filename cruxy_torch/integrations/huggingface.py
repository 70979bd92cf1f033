"""Hugging Face: a `transformers.Trainer` with our optimizers, which are told each step's loss."""

import ast
import contextlib
import copy
import re
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from cruxy_torch._controlled_optimizer import ControlledOptimizer
from cruxy_torch._optimizers.cruxy import CruxyOptimizer
from cruxy_torch._optimizers.directed import DirectedOptimizer
from cruxy_torch._roles.groups import param_groups
from cruxy_torch.training.checkpoint import write
from cruxy_torch.training.evaluation import averages
from cruxy_torch.training.horizon import tell_the_end

_REPLACED = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
_LOGGED = (
    "learning_rate", "phase", "curvature", "beta1", "beta2", "clip_threshold", "skipped_total",
)  # fmt: skip


_WEIGHTS = "cruxy_weights.pt"
"""Beside a checkpoint's model, which is the average: the weights that the run goes on from."""


class CruxyTrainer(Trainer):
    r"""`transformers.Trainer` with `CruxyOptimizer`, `AXIOM` or `Cosmic` in place of AdamW.

    It is called like the class it extends. `TrainingArguments` say what the optimizer gets:
    `learning_rate`, `weight_decay` (which biases and norms are spared), `adam_beta1`, `adam_beta2`
    (both at their defaults leave the betas to the optimizer's mode) and `adam_epsilon` in their
    usual places, and everything else in `optim_args`, such as `"mode=stability_v2"`,
    `"use_lion=True, use_gc=True"` or `"betas=(0.9, 0.95)"`; a `weight_decay` there counts before
    that of the arguments. What a string cannot hold goes the `Trainer`'s own ways:
    `optimizer_cls_and_kwargs=(CruxyOptimizer, {"lr": 1e-4, "law": law})`, or
    `optimizers=(CruxyOptimizer(groups), None)`. Both take `AXIOM` and `Cosmic` too.

    `"mode=self_driving, direction=muon"` needs nothing more: the groups are then those of
    `cruxy_torch.param_groups(model)`, by what each parameter is, which says what is decayed too:
    weights of layers and embeddings, and neither biases, norms, positions nor vectors.

    **What it does beside.** Each step's loss reaches the controller: under gradient accumulation
    that of the whole batch, and under data parallelism its mean over the ranks. `max_grad_norm` is
    set to 0 in a copy of the arguments, since after clipping the sensors would see nothing but the
    threshold; the controller clips by a threshold of its own. What the controller decided last is
    logged beside the training loss, under the prefix `cruxy_`. Checkpoints hold the controller, and
    a run that is resumed continues bit by bit.

    **Under self-driving** the optimizer is told how many steps the run has, so that its rate falls
    to 0 at the end, and the schedule is constant: a schedule is a second hand on the rate. A second
    call of `train` goes on from the first to an end of its own.
    `lr_scheduler_type="linear"`, which is the default of the arguments, counts as left out where
    there is no warm-up; another, or a scheduler in `optimizers`, is obeyed.

    **Averages.** Where the optimizer keeps an average of the parameters, as under self-driving, it
    is what is evaluated, and what is saved as the model, in checkpoints too, so that the best of
    them is what was evaluated. Beside it a checkpoint holds the weights from which it is resumed.
    Checkpoints of FSDP hold these alone.

    To extend a subclass of `Trainer`, such as TRL's, name this class first:
    `class Mine(CruxyTrainer, SFTTrainer): pass`.

    Args:
        *args: those of `transformers.Trainer`.
        release_gradients: frees each gradient as soon as its parameter is updated, see
            `CruxyOptimizer.register_hooks`. An optimizer whose hooks are registered already needs
            it not.
        total_steps: what a self-driving optimizer is told: `"run"` the steps of this run, after
            those that it took before, unless it knows an end; a number, of all its steps in all
            runs; or `None` for a run without an end.
        **kwargs: those of `transformers.Trainer`.

    Raises:
        ValueError: where `max_grad_norm` was set to anything but 0, `optim` names another
            optimizer, or the model is to run under DeepSpeed or FSDP 1, which show the optimizer
            neither raw gradients nor whole parameters; where gradients are released and accumulated
            too; from `train` where `optim_args` is not a list of `name=value`, or gradients cannot
            be released.
        TypeError: where `optimizers` or `optimizer_cls_and_kwargs` hold another optimizer; from
            `train` where `optim_args` has a name that `CruxyOptimizer` does not.
    """

    def __init__(
        self,
        *args: Any,
        release_gradients: bool = False,
        total_steps: int | Literal["run"] | None = "run",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        _check(self)
        self._releases, self._end = release_gradients, total_steps
        self._steps = 0
        self._shows_best = False
        _check_release(self, release_gradients)
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
        if self.optimizer is None:
            self._create_by_roles(cast(nn.Module, self.model if model is None else model))
        optimizer = super().create_optimizer(model)
        # FSDP 2 needs no group: its gradients name their mesh.
        if self.args.world_size > 1 and not self.is_fsdp_enabled:
            cruxy = self._cruxy()
            cruxy._process_group = cruxy._process_group or dist.group.WORLD
        if self._releases:
            self._cruxy().register_hooks()
        return optimizer

    def _create_by_roles(self, model: nn.Module) -> None:
        """Makes an optimizer that must know what each parameter is: groups of names do not say."""
        chosen = self.optimizer_cls_and_kwargs
        kind, options = chosen or self.get_optimizer_cls_and_kwargs(self.args, cast(Any, model))
        self.args.weight_decay = options.get("weight_decay", self.args.weight_decay)
        if options.get("direction") == "muon" and "params" not in options:
            groups = param_groups(model, lr=0.0, weight_decay=self.args.weight_decay)
            for group in groups:
                del group["lr"]  # all have the rate of the options
            self.optimizer = kind(groups, **options)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Makes the schedule, and tells a self-driving optimizer how many steps there are."""
        self._shows_best = False
        own = self._cruxy()
        if isinstance(own, DirectedOptimizer) and own.finds_rate:
            if isinstance(self._end, int):
                own.set_total_steps(self._end)
            self._steps = num_training_steps
            self._tell_the_end()
            usual = self.args.lr_scheduler_type == type(self.args).lr_scheduler_type
            if usual and not self.args.get_warmup_steps(num_training_steps):
                self.args.lr_scheduler_type = SchedulerType.CONSTANT
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._tell_the_end()  # which steps were before the run is known only now

    def _tell_the_end(self) -> None:
        if self._end == "run" and "total_steps" not in _options(self.args.optim_args):
            tell_the_end(self._cruxy(), self._steps, self.state.global_step)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates or predicts, by the average of the parameters where there is one."""
        with self._averages():
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the average of the parameters where there is one, else the parameters."""
        averaged = self._averages()
        for_resuming = _internal_call and not isinstance(averaged, contextlib.nullcontext)
        if for_resuming and self.is_fsdp_enabled:
            averaged = contextlib.nullcontext()
        elif for_resuming and output_dir is not None and self.args.should_save:
            named = cast(nn.Module, self.model).named_parameters()
            weights = {name: param.detach() for name, param in named if param.requires_grad}
            write(Path(output_dir) / _WEIGHTS, lambda file: torch.save(weights, file))
        with averaged:
            super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / _WEIGHTS
        if path.exists():
            saved = torch.load(path, map_location="cpu", weights_only=True)
            own = dict(cast(nn.Module, self.model if model is None else model).named_parameters())
            with torch.no_grad():
                for name, value in saved.items():
                    own[name].copy_(value)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._shows_best = True  # and the average in the optimizer is another

    def _averages(self) -> contextlib.AbstractContextManager[Any]:
        if self.optimizer is None or self._shows_best:
            return contextlib.nullcontext()
        return averages(self._cruxy())

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

    def _cruxy(self) -> ControlledOptimizer:
        """The optimizer itself, which Accelerate wraps while it trains."""
        return cast(ControlledOptimizer, getattr(self.optimizer, "optimizer", self.optimizer))


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
    if given is not None and not isinstance(given, ControlledOptimizer):
        raise TypeError(
            f"optimizers must hold an optimizer of cruxy_torch, got {type(given).__name__}; "
            "transformers.Trainer takes every other."
        )
    chosen = trainer.optimizer_cls_and_kwargs
    if chosen is not None and not issubclass(chosen[0], ControlledOptimizer):
        raise TypeError(
            f"optimizer_cls_and_kwargs must name a class of cruxy_torch, got {chosen[0]!r}; "
            "transformers.Trainer takes every other."
        )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.is_deepspeed_enabled or getattr(plugin, "fsdp_version", 2) == 1:
        name = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP 1"
        raise ValueError(
            f"the model must be replicated or sharded by FSDP 2, got {name}; "
            "fsdp=True in the training arguments is the latter."
        )


def _check_release(trainer: CruxyTrainer, release: bool) -> None:
    released = release or getattr(trainer.optimizer, "_release", None) is not None
    steps = trainer.args.gradient_accumulation_steps
    if released and steps > 1:
        raise ValueError(
            f"gradient_accumulation_steps must be 1 to release gradients, got {steps}: a gradient "
            "is gone when the next micro-batch comes; make the batch larger."
        )
    if released and trainer.is_fsdp_enabled:
        raise ValueError(
            "release_gradients must be False under FSDP, got hooks on parameters that Accelerate "
            "replaces; shard the model with fully_shard and register hooks in a loop of your own."
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
