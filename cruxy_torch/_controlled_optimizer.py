"""What our optimizers share: one controller over all groups, its step, its telemetry, its state."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer

from cruxy_control import Law
from cruxy_control.law import check_excess, check_law, needs_alignment, short
from cruxy_torch import _checks, _law_state, _step, _telemetry
from cruxy_torch._averaged import averaged_block
from cruxy_torch._diagnose import Diagnosed
from cruxy_torch._distributed.replicas import ReplicaCheck
from cruxy_torch._distributed.shards import is_sharded
from cruxy_torch._law_state import KEY
from cruxy_torch._loading import load
from cruxy_torch._native.fit import Passes
from cruxy_torch._release import Release
from cruxy_torch._sensors.clipped import ClippedCheck
from cruxy_torch._sensors.loss import mean_loss, scalar_loss
from cruxy_torch._telemetry_log import TelemetryLog
from cruxy_torch.backends import path


class ControlledOptimizer(Diagnosed, Optimizer):
    """An optimizer under a control law. A subclass says what a group updates, and how.

    It writes `_group` and `_check_group`. The law's state lies in
    `param_groups[0]["controller"]`. What is to be pickled beside groups and state stands in
    `_pickled`.

    Args:
        params: parameters or groups.
        defaults: options of a group.
        law: the control law.
        lr_bounds: absolute bounds on each rate before the phase factor; `None` for none.
        process_group: ranks that hold the same gradients but a loss of their own.
        log_path: where a line a step is logged; `None` for nowhere.
    """

    _pickled: tuple[str, ...] = ("_settings", "_log")
    _compile = False

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        law: Law,
        lr_bounds: tuple[float, float] | None = None,
        process_group: dist.ProcessGroup | None = None,
        log_path: str | Path | None = None,
    ) -> None:
        check_law(law)
        _checks.check_lr_bounds(lr_bounds)
        like = torch.zeros((), dtype=torch.float32, device="cpu")
        names = _law_state.names_of(law.init(like, xp=torch))
        self._settings = _step.Settings(law, names, lr_bounds)
        self._process_group = process_group
        self._forget()
        super().__init__(params, defaults)
        if all(group.get("averaging") is None for group in self.param_groups):
            check_excess(law, remedy="keep an average with averaging=16")
        if needs_alignment(law) and _step.is_zero(defaults["lr"]):
            raise ValueError(
                "lr must be above 0 under a law that finds the rate, got 0: it multiplies what it "
                "is given; leave lr out. A parameter group may be at 0, which stands still."
            )
        self._log = None if log_path is None else TelemetryLog(log_path, self._shown())
        self._step_supports_amp_scaling = True

    def _forget(self) -> None:
        """Sets what belongs to this process and this moment, and is never saved."""
        self._observed: list[float | Tensor] = []
        self._release: Release | None = None
        self._averaged = False
        self._numbers: dict[Tensor, int] = {}
        self._replicas, self._clipped = ReplicaCheck(), ClippedCheck()
        self._held: dict[str, Tensor] = {}  # the law's state, should its group be taken out

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group with options of its own; the one controller sees its gradients too."""
        param_group = _checks.listed({k: v for k, v in param_group.items() if k != KEY})
        _checks.check_options(type(self), self.defaults, param_group)
        self._check_group({**self.defaults, **param_group})
        _checks.check_params(param_group["params"])
        super().add_param_group(param_group)
        self._numbers = {}
        group = self.param_groups[-1]
        if self._release is not None:
            self._release.register(group["params"])
        if not self._held:
            real = (p.device for p in group["params"] if not p.is_meta)
            self._held = _law_state.start(self._settings.law, next(real, torch.device("cpu")))
        self._law()

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | float | Tensor | None = None,
        loss: float | Tensor | None = None,
    ) -> Any:
        """Measures, asks the law, and updates every parameter that has a gradient.

        Under `torch.amp.GradScaler` call `scaler.step(optimizer, loss=loss)` with the loss before
        scaling: gradients are unscaled on the way, without writing to them, and a step on which the
        scaler found an infinity is skipped.

        Args:
            closure: clears gradients, computes the loss, calls `backward` and returns the loss; or
                the loss itself.
            loss: this step's loss: a tensor of one element, which is not waited for, or a number.
                It is the one of which these are the gradients: where they are accumulated the mean
                over micro-batches. Without it what `observe` was given counts, else what the
                closure returned, else the curvature is held. A loss that is not finite counts as
                none.

        Returns:
            What the closure returned; without one, `loss`.

        Raises:
            ValueError: where the loss is not one real number.
            RuntimeError: where a gradient is sparse.
        """
        if self._averaged:
            raise RuntimeError(
                "step() must not be called inside averaged(), whose end would undo it; leave the "
                "block first."
            )
        if closure is not None and not callable(closure):
            closure, loss = None, _checks.one_loss(closure, loss)
        result = loss
        if closure is not None:
            with torch.enable_grad():
                result = closure()
            loss = result if loss is None and not self._observed else loss
        losses = self._observed if loss is None else [scalar_loss(loss)]
        self._observed = []
        release = self._release
        moved = self._step_all(losses) if release is None else release.close(self, losses)
        if moved and self._log is not None:
            self._log.log(_telemetry.everything(self._law()))
        return result

    def _step_all(self, losses: list[float | Tensor]) -> bool:
        """An ordinary step; returns whether there was anything to step with."""
        fresh = not self.state
        groups = [self._group(index) for index in range(len(self.param_groups))]
        grad = next((g for group in groups for g in group.grads), None)
        if grad is None and self._process_group is None:
            return False
        law_state = self._law(grad)
        device = law_state["step"].device
        native, foreach = self._path(device)
        self._run()(
            self._settings,
            law_state,
            groups,
            mean_loss(losses, device),
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
            self._process_group,
            native=native,
            foreach=foreach,
        )
        if losses and self._process_group is None and grad is not None and not is_sharded(grad):
            self._replicas.look(law_state["report"])
        self._clipped.look(law_state["report"])
        self._mark_still(fresh=fresh)
        return True

    def _mark_still(self, *, fresh: bool) -> None:
        """Tells each group whether a rate of 0 has just kept it where it was."""
        bounded = self._settings.lr_bounds is not None
        zero = [not bounded and _step.is_zero(group["lr"]) for group in self.param_groups]
        for group, still in zip(self.param_groups, zero, strict=True):
            if not still:
                group.pop("still", None)
            elif not (fresh and all(zero)):  # else a tool fills the state of a new optimizer
                group["still"] = True

    def register_hooks(self) -> None:
        """From now on `backward` updates each parameter and frees its gradient as soon as it can.

        What remains alive is the largest gradient instead of all of them. `step(loss=loss)` is
        called after every `backward` as before: it steps the law with what was measured on the way.
        Three things differ from ordinary steps, since a gradient is gone before the norm of all of
        them is known:

        - Rate, betas and clipping threshold are those the law ordered at the end of the last good
          step; at the first nothing is ordered.
        - Each tensor is clipped by its own norm.
        - The guard is weaker: a tensor whose gradient is not finite is left as it was, with its
          moments; others may have moved. The law passes over such a step, which counts as skipped.

        With a law that orders nothing the result is that of ordinary steps. A gradient that no hook
        has seen, such as one that was assigned, is used by `step`. A closure is called once. A
        second call hooks parameters that are trained since the first. Hooks are not pickled; what
        was measured between `backward` and `step` is not saved.

        Raises:
            ValueError: under `compile=True`; where several processes train plain parameters, as
                under `DistributedDataParallel`, which averages gradients only after the hooks.
                `fully_shard` averages before.

        While hooks are registered `backward` raises `RuntimeError` where a parameter gets a second
        gradient before `step` (gradient accumulation), and `step` does so under a `GradScaler`.
        `torch.nn.utils.clip_grad_norm_` finds no gradients and does nothing.
        """
        if self._process_group is not None:
            raise ValueError(
                "process_group must be None to release gradients, got one: DistributedDataParallel "
                "averages a gradient after it would have been used; use "
                "torch.distributed.fsdp.fully_shard, which averages it before."
            )
        if needs_alignment(self._settings.law):
            raise ValueError(
                'mode must not be "self_driving" to release gradients: its law compares all '
                'gradients with all moments before any of them moves; use mode="meta3".'
            )
        if self._compile:
            raise ValueError(
                "compile must be False to release gradients, got True; a step that is spread over "
                "the backward pass cannot be compiled as a whole."
            )
        release = self._release or Release(self)
        release.register(param for group in self.param_groups for param in group["params"])
        self._release = release

    def remove_hooks(self) -> None:
        """Returns to ordinary steps; what `backward` has already updated since the last stays."""
        if self._release is not None:
            self._release.remove()
        self._release = None

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the parameters are their averages over the run, for evaluating, saving.

        They are copied in place, and always copied back, whatever happens in the block; one more
        copy of the parameters lives as long. A parameter without an average (`averaging=None`, or
        no step taken yet) stays as it is.

        Raises:
            ValueError: where no parameter group keeps an average.
            RuntimeError: from `step` inside the block, where it would be undone; where blocks are
                nested.

        Examples:
            >>> import torch
            >>> from cruxy_torch import CruxyOptimizer
            >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
            >>> optimizer = CruxyOptimizer([x], mode="self_driving")
            >>> for _ in range(300):
            ...     loss = ((x - 5.0) ** 2).sum()
            ...     optimizer.zero_grad()
            ...     loss.backward()
            ...     _ = optimizer.step(loss=loss)
            >>> with optimizer.averaged():
            ...     print(x.detach().round(decimals=1))
            tensor([5., 5.])
        """
        if not any(group.get("averaging") is not None for group in self.param_groups):
            raise ValueError(
                "averaged() needs averages, but every group has averaging=None; use averaging=16 "
                'or mode="self_driving".'
            )
        with averaged_block(self):
            yield

    def observe(self, loss: float | Tensor) -> None:
        """Hands over the loss of the coming step where `step` itself cannot take it.

        For loops that call `optimizer.step()` for you. Called several times before a step, as with
        gradient accumulation, the mean counts. It is not waited for.

        Args:
            loss: a tensor of one element or a number.

        Raises:
            ValueError: where it is not one real number.
        """
        self._observed.append(scalar_loss(loss))

    def telemetry(self) -> dict[str, float | int | bool]:
        """What the last step measured and decided; waits for the device once.

        Returns:
            By name: `learning_rate`, `beta1` and `beta2` as the first group applied them (0, 1
            and 1 on a skipped step), `phase`, `curvature`, `warning`, `meta_scale`, `phase_scale`,
            `clip_threshold`, `clip_scale`, `alignment` (smoothed), the signals `grad_norm`,
            `gamma_norm` and `loss` (NaN where there was none), `ok`, and the counters `step` (good
            steps), `skipped_total` and `skipped_in_a_row`. What an optimizer or its law does not
            have is left out: the betas where the law does not move them, `alignment` but under
            self-driving, and `sign_weight` and `decay_scale` but under `PlateauGuard`. Before the
            first step `ok` is true, these two are 1, and all else but the counters is NaN. It is
            part of the state and so survives a resume.
        """
        return _telemetry.named(_telemetry.everything(self._law()).tolist(), self._shown())

    def _shown(self) -> frozenset[str]:
        """The names in the telemetry."""
        betas = any("betas" in group for group in self.param_groups)
        return _telemetry.shown(self._settings.names, betas=betas)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, into the tensors that are here where there are any.

        Unlike the base class it keeps float32 moments of half-precision parameters in float32 and
        codes as codes, shares no memory with the dictionary and leaves it as it was. Moments have
        the bits they were saved with.

        Args:
            state_dict: what `state_dict` gave, of an optimizer with the same groups and law.

        Raises:
            ValueError: where the groups, the law or the format differ, or codes were saved under a
                sharding whose blocks do not fit.
        """
        load(self, self._law(), state_dict, super().load_state_dict)
        self._observed = []
        if self._release is not None:
            self._release.forget()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and what a backward pass with registered hooks has left open.

        Args:
            set_to_none: frees the gradients instead of filling them with zeros.
        """
        super().zero_grad(set_to_none)
        if self._release is not None:
            self._release.forget()

    def _group(self, index: int, only: Tensor | None = None) -> _step.Group:
        """What of a group has a gradient, or one parameter of it; a subclass has to say."""
        raise TypeError(f"{type(self).__name__} must say what it updates.")

    def _late_group(self, index: int, moving: Sequence[Tensor]) -> _step.Group | None:
        """What of a group is to be moved at the end of a pass that has updated these parameters."""
        return None

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises where an option of a group, defaults filled in, is outside its range."""
        raise TypeError(f"{type(self).__name__} must say what it takes.")

    def _saved_dtype(self, param: Tensor, group: dict[str, Any]) -> torch.dtype | None:
        """The dtype of a loaded first moment that is not coded; `None` for that which was saved."""
        return None

    def _path(self, device: torch.device) -> tuple[Passes | None, bool]:
        """The library to take, and whether to take foreach calls for the rest."""
        return path(device)

    def _run(self) -> Callable[..., None]:
        """What takes an ordinary step: `_step.run`, as it is or compiled."""
        return _step.run

    def state_dict(self) -> dict[str, Any]:
        """As of every optimizer; the controller's state is in the first group."""
        self._law()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._law()
        return super().__getstate__() | {name: self.__dict__[name] for name in self._pickled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._step_supports_amp_scaling = True
        if "_release" not in self.__dict__:  # unpickled, and not loaded into
            self._process_group = None
            self._forget()
            self._held = self.param_groups[0][KEY] if self.param_groups else {}
        for group in self.param_groups:
            group.setdefault("relative_limit", None)
            group.setdefault("averaging", None)
            group.setdefault("average_bits", 32)

    def __repr__(self) -> str:
        law_state = self._law()
        del self.param_groups[0][KEY]
        try:
            name, _, rest = super().__repr__().partition(" (")
            return f"{name} under {short(self._settings.law)} ({rest}"
        finally:
            self.param_groups[0][KEY] = law_state

    def _law(self, grad: Tensor | None = None) -> dict[str, Tensor]:
        """The law's state, moved to where a gradient is."""
        law_state = _law_state.in_first(self.param_groups, self._held)
        if grad is not None and law_state["step"].device != grad.device:
            for name, value in law_state.items():
                law_state[name] = value.to(grad.device)
        return law_state
