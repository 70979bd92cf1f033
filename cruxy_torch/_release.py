"""Gradient release: each parameter is updated, and its gradient freed, inside `backward`.

`Release` says when a parameter is updated, `Pass` how, and what the law learns of it at the end.
"""

import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from cruxy_control import Signals
from cruxy_control.controls import clip_scale
from cruxy_torch import _law_state, _step, _telemetry
from cruxy_torch._distributed.shards import in_processes, is_sharded
from cruxy_torch._native.fit import Passes
from cruxy_torch._orders import Orders
from cruxy_torch._sensors.loss import mean_loss
from cruxy_torch._sensors.measure import conclude, signals, whole_sums
from cruxy_torch._sensors.sizes import sizes, sizes_by_group, whole_mean_square


class Release:
    """The hooks of one optimizer, and the pass that is open since its last step.

    Parameters hold no reference to the optimizer: one that is dropped releases nothing any more.

    Args:
        optimizer: the `ControlledOptimizer` whose parameters are updated. What an update raises
            comes out of `backward`.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._done: set[Tensor] = set()
        self._pass: Pass | None = None
        self._indices: dict[Tensor, int] = {}

    def register(self, params: Iterable[Tensor]) -> None:
        """Hooks those that are trained and not hooked yet."""
        new = [p for p in params if p.requires_grad and p not in self._handles]
        if in_processes() and not all(map(is_sharded, new)):
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
        self.forget()

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
        optimizer = self._optimizer()
        if optimizer is None:
            return
        with torch.no_grad():
            self._update(optimizer, param)
        param.grad = None
        self._done.add(param)

    def _update(self, optimizer: Any, param: Tensor) -> None:
        native, _ = optimizer._path(param.device)
        if self._pass is None:
            groups = optimizer.param_groups
            limited = [g for g in groups if g["relative_limit"] is not None]
            trained = [[p for p in group["params"] if p.requires_grad] for group in limited]
            whole = whole_mean_square([sizes(ps, native=native) for ps in trained if ps])
            self._pass = Pass(optimizer._settings, optimizer._law(param.grad), whole)
            self._indices = {p: i for i, group in enumerate(groups) for p in group["params"]}
        self._pass.update(optimizer._group(self._indices[param], param), native=native)

    def close(self, optimizer: Any, losses: list[float | Tensor]) -> bool:
        """Ends the pass; returns whether it updated anything.

        A gradient that no hook has seen is used first.

        Args:
            optimizer: whose step it is.
            losses: of this step.

        Raises:
            RuntimeError: under a `GradScaler`, whose factor the updates could not know.
        """
        try:
            if getattr(optimizer, "grad_scale", None) is not None:
                raise RuntimeError(
                    "gradients must not be scaled while hooks are registered, got a step under "
                    "GradScaler: they were used as they came, before it could unscale them; "
                    "use torch.bfloat16 without a scaler, or call remove_hooks()."
                )
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        self(param)
            if self._pass is None:
                return False
            device = optimizer._law()["step"].device
            groups = range(len(optimizer.param_groups))
            late = [optimizer._late_group(index, list(self._done)) for index in groups]
            first, loss = optimizer._group(0), mean_loss(losses, device)
            self._pass.close(first, loss, [group for group in late if group is not None])
            return True
        finally:
            self.forget()

    def forget(self) -> None:
        """Begins a new pass, whatever the last one has come to."""
        self._done.clear()
        self._pass = None


def _hook(release: "weakref.ref[Release]", param: Tensor) -> None:
    owner = release()
    if owner is not None:
        owner(param)


class Pass:
    """A step spread over a backward pass, from the first gradient to `close`.

    What the law ordered on the last good step holds for all of it. Two things are decided anew for
    each parameter, from its own gradient: whether it is finite, and by how much it is clipped.

    Args:
        settings: see there.
        law_state: see `_law_state`.
        whole: the mean square of all tensors under a limit, see `_step.with_limits`.
    """

    def __init__(
        self, settings: _step.Settings, law_state: dict[str, Tensor], whole: Tensor | None
    ) -> None:
        self._settings, self._law_state, self._whole = settings, law_state, whole
        self._xp = _law_state.namespace(law_state)
        last = _law_state.last_controls(law_state)
        one = self._xp.ones_like(last.clip_scale)
        last = _step.with_largest_norm(
            last._replace(clip_scale=one), 0.0 * one, settings, xp=self._xp
        )
        self._controls = last
        device = law_state["step"].device
        self._key: Any = None
        self._one = torch.ones((), dtype=torch.float32, device=device)
        self._total = torch.zeros(2, dtype=torch.float32, device=device)
        self._meshes: dict[Any, None] = {}
        self._ordered: dict[int, Orders] = {}

    def update(self, group: _step.Group, *, native: Passes | None) -> None:
        """Measures and updates one parameter; what it measured counts at `close`.

        Args:
            group: with that parameter alone.
            native: a library that takes what it can take; `None` for none.
        """
        (grad,) = group.grads
        if is_sharded(grad):
            self._meshes[grad.device_mesh] = None
        gamma = self._settings.law.gamma
        total = whole_sums(grad, gamma, self._one, native=native)
        self._total += total
        sensed = signals(total, self._one, gamma)
        norms = (sensed.grad_norm, sensed.gamma_norm)
        norm, sigma = _law_state.as_scalars(norms, self._xp)
        with _law_state.quiet(self._xp):
            ok = self._xp.isfinite(norm) & self._xp.isfinite(sigma)
            factor = clip_scale(self._controls.clip_threshold, norm, xp=self._xp)
            orders = self._orders(group).guarded(ok, factor, xp=self._xp)
            (count,) = _law_state.as_scalars([self._law_state["step"]], self._xp)
            (own,) = sizes_by_group([group.limited()], native=native)
            orders = _step.with_limits(group, orders, count, own, self._whole, xp=self._xp)
        group.update(orders, native=native, foreach=False)

    def close(self, group: _step.Group, loss: Tensor, late: Sequence[_step.Group]) -> None:
        """Steps the law with what the whole pass has measured.

        Args:
            group: the first, whose rate and betas are reported.
            loss: float32, 0-d, NaN where there is none.
            late: what moves at the end of the pass.
        """
        (count,) = _law_state.as_scalars([self._law_state["step"]], self._xp)
        sensed = conclude(self._total, loss, self._meshes, self._settings.law.gamma)
        settings = self._settings
        controls = _law_state.advance(settings.law, settings.names, self._law_state, sensed)
        sensed = Signals(*_law_state.as_scalars(sensed, self._xp))
        controls = _step.with_largest_norm(controls, sensed.grad_norm, settings, xp=self._xp)
        report = _step.recorded(sensed, controls, self._orders(group), xp=self._xp)
        _telemetry.record(self._law_state, report)
        for each in late:
            orders = self._orders(each)._replace(ok=controls.ok)
            orders = _step.with_limits(each, orders, count, None, None, xp=self._xp)
            each.update(orders, native=None, foreach=False)

    def _orders(self, group: _step.Group) -> Orders:
        """What a group applies to a gradient that is finite and not clipped."""
        if group.rounds and self._key is None:
            names = ("step", "skipped_total")
            numbers = _law_state.as_scalars([self._law_state[n] for n in names], self._xp)
            with _law_state.quiet(self._xp):
                self._key = _step.random_key(dict(zip(names, numbers, strict=True)), xp=self._xp)
        if group.index not in self._ordered:
            self._ordered[group.index] = _step.orders_of(
                group, self._controls, self._one, 0, self._settings, xp=self._xp
            )
        return self._ordered[group.index]._replace(key=self._key if group.rounds else 0)
