"""Gradient release: each parameter is updated, and its gradient freed, inside `backward`."""

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from cruxy_torch._sensors.measure import is_sharded


class ReleasingOptimizer(Optimizer):
    """What our optimizers share: `register_hooks`, `remove_hooks`, and what `step` needs for them.

    A subclass has `_update_one(param)`, which updates one parameter from its `.grad`. Its `step`
    asks `_releasing` and then, in place of updating, calls `_close_pass()` and does what is to be
    done once a step.
    """

    _hooks: "Hooks | None" = None

    def register_hooks(self) -> None:
        """From now on `backward` updates each parameter and frees its gradient as soon as it can.

        What remains alive is the largest gradient instead of all of them. Call `step` after every
        `backward` as before: it ends the pass. A gradient that no hook has seen, such as one that
        was assigned, is used by `step`. Hooks are not pickled. A second call adds parameters that
        have begun to be trained.

        Raises:
            ValueError: where several processes train plain parameters, as under
                `DistributedDataParallel`, which averages gradients only after the hooks.

        While hooks are registered `backward` raises `RuntimeError` where a parameter gets a second
        gradient before `step` (gradient accumulation), and `step` does so under a `GradScaler`.
        `torch.nn.utils.clip_grad_norm_` finds no gradients and does nothing.
        """
        hooks = self._hooks or Hooks(self._update_one)
        hooks.register(param for group in self.param_groups for param in group["params"])
        self._hooks = hooks

    def remove_hooks(self) -> None:
        """Returns to ordinary steps; what `backward` has already updated since the last stays."""
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its parameters are hooked where the others are."""
        super().add_param_group(param_group)
        if self._hooks is not None:
            self._hooks.register(self.param_groups[-1]["params"])

    @property
    def _releasing(self) -> bool:
        return self._hooks is not None

    def _update_one(self, param: Tensor) -> None:
        raise TypeError(f"{type(self).__name__} must say how to update one parameter.")

    def _close_pass(self) -> bool:
        """Ends a pass and returns whether it updated any parameter.

        Raises:
            RuntimeError: under a `GradScaler`, whose factor the update could not know.
        """
        hooks = self._hooks or Hooks(self._update_one)
        if getattr(self, "grad_scale", None) is not None:
            hooks.forget()
            raise RuntimeError(
                "gradients must not be scaled while hooks are registered, got a step under "
                "GradScaler: they were used as they came, before it could unscale them; "
                "use torch.bfloat16 without a scaler, or call remove_hooks()."
            )
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    hooks(param)
        return hooks.forget()


class Hooks:
    """The hooks of one optimizer, and which parameters they have updated since its last step.

    Parameters hold no reference to the optimizer: one that is dropped releases nothing any more.

    Args:
        update: the optimizer's method that updates one parameter. What it raises comes out of
            `backward`.
    """

    def __init__(self, update: Callable[[Tensor], None]) -> None:
        self._update = weakref.WeakMethod(update)
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._done: set[Tensor] = set()

    def register(self, params: Iterable[Tensor]) -> None:
        """Hooks those that are trained and not hooked yet."""
        new = [p for p in params if p.requires_grad and p not in self._handles]
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several and not all(map(is_sharded, new)):
            raise ValueError(
                "with several processes every parameter must be a DTensor to release its gradient, "
                "got plain ones: DistributedDataParallel and FSDP 1 average a gradient after it "
                "would have been used; use torch.distributed.fsdp.fully_shard, which averages it "
                "before."
            )
        hook = functools.partial(_hook, weakref.ref(self))
        self._handles |= {p: p.register_post_accumulate_grad_hook(hook) for p in new}

    def remove(self) -> None:
        """Takes them away."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._done.clear()

    def forget(self) -> bool:
        """Begins a new pass; returns whether the last one updated anything."""
        anything = bool(self._done)
        self._done.clear()
        return anything

    def __call__(self, param: Tensor) -> None:
        """Updates a parameter and frees its gradient."""
        if param in self._done:
            param.grad = None
            raise RuntimeError(
                "each parameter must have one backward pass a step while hooks are registered, got "
                f"a second for one of shape {tuple(param.shape)}, which has been updated already; "
                "call step() after each backward(), make the batch larger in place of accumulating "
                "gradients, or call remove_hooks()."
            )
        update = self._update()
        if update is None:
            return
        with torch.no_grad():
            update(param)
        param.grad = None
        self._done.add(param)


def _hook(hooks: "weakref.ref[Hooks]", param: Tensor) -> None:
    owner = hooks()
    if owner is not None:
        owner(param)
