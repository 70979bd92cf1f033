"""`CruxyOptimizer`: the control law around Adam and Lion, called like `torch.optim.AdamW`."""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer

from cruxy_control import Law
from cruxy_control.law import check_law
from cruxy_torch import _checks, _controller, _metrics, _native, _step
from cruxy_torch._kernels import Options, Tensors, compute_dtype

Mode = Literal["meta3", "stability_v2", "stability_v1"]

_MEMORY = "controller"


class CruxyOptimizer(Optimizer):
    r"""AdamW or Lion under the Cruxy controller, called like `torch.optim.AdamW`.

    **What it does differently from AdamW.** On a steady gradient `mode="meta3"` runs at 0.75 of
    the rate that was set (the phase throttle), `beta1` is about 0.873 where 0.9 is set, `beta2` is
    at its lower bound 0.9 whatever is set, the gradient norm is clipped at about 1.5, and momentum
    is Nesterov's. A step whose gradient is not finite is skipped. Each can be switched off:
    `law=Meta3(phase_strength=0)`, `Meta3(beta1_gain=0)`, `Meta3(beta2_phase_strength=0)`,
    `Meta3(clip_threshold=None)`, `use_nesterov=False`.

    Each step takes both norms of the raw gradient over all groups, asks the law what to do, and
    updates: Adam as

    $$
    m_t = \beta_{1,t} m_{t-1} + (1 - \beta_{1,t}) g_t, \qquad
    v_t = \beta_{2,t} v_{t-1} + (1 - \beta_{2,t}) g_t^2, \qquad
    \theta_t = \theta_{t-1} - \eta_t \Big(\frac{\hat m_t}{\sqrt{\hat v_t} + \varepsilon}
    + \lambda \theta_{t-1}\Big)
    $$

    and Lion (WP 11-13) with the sign of `beta1 m + (1 - beta1) g` in place of the quotient and one
    moment. The moments are normalised by what they really weigh, one minus the product of all
    their decay rates. `.grad` is read and never written to.

    The learning rate in `param_groups` is the user's: schedulers move it, and the controller
    multiplies it. Groups may set `lr`, `betas`, `eps`, `weight_decay`, `decoupled_weight_decay`,
    `use_nesterov`, `use_lion`, `use_gc` and `maximize` of their own; one controller sees them all.

    On CPU, float32 tensors take a small C library that is built on the first step where there is
    a C compiler (about a second, once per machine); everything else takes torch's own operations.
    No step waits for the device. Under `torch.compile` give `lr` as a tensor.

    Args:
        params: parameters, or parameter groups, as for every `torch.optim` optimizer.
        lr: learning rate, at least 0; a number or a tensor of one element. About 1e-3 for Adam and
            1e-4 for Lion.
        mode: `"meta3"` (recommended), `"stability_v2"` or `"stability_v1"`.
        betas: bases of the two decay rates, each in `[0, 1)`, which the controller moves. The
            default is that of `cruxy` 2.1.0 with `use_lion` too; Lion's authors use (0.9, 0.99).
        eps: added to the root of the second moment, at least 0.
        weight_decay: its coefficient, at least 0.
        decoupled_weight_decay: decays as AdamW does; otherwise the decay is added to the clipped
            gradient (L2). Lion always decouples.
        use_nesterov: looks one step ahead. Adam only.
        use_lion: Lion instead of Adam: 4 bytes of state a float32 parameter instead of 8.
        use_gc: gradient centralization: subtracts from a gradient of two or more axes its mean over
            all but the first, after measuring and clipping.
        meta_lr_eta: gain of the slow loop on the rate (WP 9); `meta3` only, as the next two.
        meta_lr_beta2: gain of the slow loop on `beta2` (WP 10).
        meta_interval: steps between two moves of the slow loop.
        gamma_norm: exponent of the norm the sensors take (WP 1), at least 1; not `stability_v1`.
        log_metrics: appends one JSON line a step to `metrics_path`: the telemetry, with the
            learning rate as `lr`. Written every 100 steps and at the end; `null` where a number is
            not finite; under `torch.distributed` by rank 0 alone.
        metrics_path: that file.
        compile: compiles the whole step with `torch.compile`; the first step then takes seconds.
        law: a law with constants of one's own, in place of `mode` and its four constants.
        lr_bounds: absolute bounds on the rate times its slow factor; `None` for none. They change
            what was asked for; `cruxy` 2.1.0 has (1e-7, 1e-2).
        momentum_dtype: dtype of the first moment. `None` is the parameter's, but float32 for
            float16; `torch.bfloat16` halves Lion's state. The second moment is float32 always
            (float64 for float64 parameters).
        bias_correction: `"exact"`, or `"cruxy_2_1_0"` for that package's, which raises today's
            decay rate to the power of the step.
        maximize: climbs instead of descending.
        foreach: torch's foreach operations; by default on every device but the CPU.
        fused: the C library on CPU. `None` takes it where it can be built and the tensors fit,
            `True` insists on it, `False` does without.
        capturable: kept for code that looks for it: a step can always be captured in a CUDA graph.
        differentiable: must be false.
        process_group: ranks that hold the same gradients, as under `DistributedDataParallel`, but
            pass a loss of their own: one all-reduce a step keeps their controllers alike, and a
            rank may have no loss. `fully_shard` needs none: its mesh is used. Not pickled.

    Raises:
        ValueError: where an argument is outside its range or two exclude each other.
        TypeError: where an argument has the wrong type, such as a law's class for an instance.
        RuntimeError: where `fused=True` and the library cannot be built; from `step` where a
            gradient is sparse.

    Example:
        >>> import torch
        >>> from cruxy_torch import CruxyOptimizer
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        >>> optimizer = CruxyOptimizer([x], lr=0.003)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     loss = (x**2).sum()
        ...     loss.backward()
        ...     _ = optimizer.step(loss=loss)
        ...     print(f"{loss.item():.3f}")
        14.000
        13.972
        13.945
        >>> round(optimizer.telemetry()["phase"], 3)
        0.5

    References:
        Cruxy Stability Engine White Paper v2.1 (WP); Loshchilov and Hutter, [Decoupled Weight Decay
        Regularization](https://arxiv.org/abs/1711.05101), 2019; Chen et al., [Symbolic Discovery of
        Optimization Algorithms](https://arxiv.org/abs/2302.06675), 2023.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        mode: Mode = "meta3",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        decoupled_weight_decay: bool = True,
        use_nesterov: bool = True,
        use_lion: bool = False,
        use_gc: bool = False,
        meta_lr_eta: float = 0.05,
        meta_lr_beta2: float = 0.03,
        meta_interval: int = 10,
        gamma_norm: float = 1.5,
        log_metrics: bool = False,
        metrics_path: str | Path = "./cruxy_metrics.jsonl",
        compile: bool = False,
        *,
        law: Law | None = None,
        lr_bounds: tuple[float, float] | None = None,
        momentum_dtype: torch.dtype | None = None,
        bias_correction: Literal["exact", "cruxy_2_1_0"] = "exact",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = True,
        differentiable: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if law is None:
            law = _checks.law_of(mode, gamma_norm, meta_lr_eta, meta_lr_beta2, meta_interval)
        check_law(law)
        _checks.check_choices(
            lr_bounds, momentum_dtype, bias_correction, foreach, fused, compile, differentiable
        )
        self._settings = _step.Settings(
            law=law,
            names=_controller.names_of(law.init(torch.zeros(()), xp=torch)),
            lr_bounds=lr_bounds,
            momentum_dtype=momentum_dtype,
            power=bias_correction == "cruxy_2_1_0",
        )
        self._foreach, self._fused, self._compile = foreach, fused, compile
        self._metrics = _metrics.MetricsLog(metrics_path) if log_metrics else None
        self._process_group = process_group
        self._observed: list[float | Tensor] = []
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "use_nesterov": use_nesterov,
            "use_lion": use_lion,
            "use_gc": use_gc,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults)
        self._step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group with options of its own; the one controller sees its gradients too."""
        param_group = {key: value for key, value in param_group.items() if key != _MEMORY}
        _checks.check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"]:
            _checks.check_param(param)
        if len(self.param_groups) == 1:
            device = group["params"][0].device if group["params"] else torch.device("cpu")
            device = torch.device("cpu") if device.type == "meta" else device
            group[_MEMORY] = _controller.start(self._settings.law, device)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        loss: float | Tensor | None = None,
    ) -> Any:
        """Measures, asks the law, and updates every parameter that has a gradient.

        Under `torch.amp.GradScaler` call `scaler.step(optimizer, loss=loss)` with the loss before
        scaling: gradients are unscaled on the way, without writing to them, and a step on which the
        scaler found an infinity is skipped.

        Args:
            closure: clears gradients, computes the loss, calls `backward` and returns the loss.
            loss: this step's loss: a tensor of one element, which is not waited for, or a number.
                Without it what `observe` was given counts, else what the closure returned, else
                the curvature is held. A loss that is not finite counts as none.

        Returns:
            What the closure returned; without one, `loss`.

        Raises:
            ValueError: where the loss is not one real number.
            RuntimeError: where a gradient is sparse.
        """
        result = loss
        if closure is not None:
            with torch.enable_grad():
                result = closure()
            loss = result if loss is None and not self._observed else loss
        losses = self._observed if loss is None else [_checks.scalar_loss(loss)]
        self._observed = []
        groups = self._groups()
        if not any(group.tensors.grads for group in groups) and self._process_group is None:
            return result
        memory = self._memory(groups)
        device = memory["step"].device
        native, foreach = self._path(device)
        self._run()(
            self._settings,
            memory,
            groups,
            _checks.mean_loss(losses, device),
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
            self._process_group,
            native,
            foreach,
        )
        if self._metrics is not None:
            self._metrics.log(_controller.everything(memory))
        return result

    def observe(self, loss: float | Tensor) -> None:
        """Hands over the loss of the coming step where `step` itself cannot take it.

        For loops that call `optimizer.step()` for you. Called several times before a step, as with
        gradient accumulation, the mean counts. It is not waited for.

        Args:
            loss: a tensor of one element or a number.

        Raises:
            ValueError: where it is not one real number.
        """
        self._observed.append(_checks.scalar_loss(loss))

    def telemetry(self) -> dict[str, float | int | bool]:
        """What the last step measured and decided; waits for the device once.

        Returns:
            By name: `learning_rate`, `beta1` and `beta2` as the first group applied them (0, 1
            and 1 on a skipped step), `phase`, `curvature`, `warning`, `meta_scale`, `phase_scale`,
            `clip_threshold`, `clip_scale`, the signals `grad_norm`, `gamma_norm` and `loss` (NaN
            where there was none), `ok`, and the counters `step` (good steps), `skipped_total` and
            `skipped_in_a_row`. Before the first step all but the counters are NaN and `ok` is
            true. It is part of the state and so survives a resume.
        """
        memory = self.param_groups[0][_MEMORY]
        return _controller.named(_controller.everything(memory).tolist())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, into the tensors that are here where there are any.

        Unlike the base class it keeps float32 moments of half-precision parameters in float32,
        shares no memory with the dictionary and leaves it as it was.

        Args:
            state_dict: what `state_dict` gave, of an optimizer with the same groups and law.

        Raises:
            ValueError: where the groups, the law or the format differ.
        """
        memory = self.param_groups[0][_MEMORY]
        old = {param: dict(state) for param, state in self.state.items()}
        final: dict[str, Any] = {}

        def capture(_: Optimizer, state_dict: dict[str, Any]) -> None:
            final.update(state_dict)
            _controller.check(memory, state_dict["param_groups"][0].get(_MEMORY))

        def restore(_: Optimizer) -> None:
            _controller.load(memory, self.param_groups[0][_MEMORY])
            self.param_groups[0][_MEMORY] = memory
            self._restore_state(old, final)

        # Hooks of the user may change the dictionary before us and look at the result after us.
        before = self.register_load_state_dict_pre_hook(capture)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
        self._observed = []

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_settings", "_foreach", "_fused", "_compile", "_metrics")
        return super().__getstate__() | {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._step_supports_amp_scaling = True
        self.__dict__.setdefault("_process_group", None)
        self._observed = []

    def __repr__(self) -> str:
        memory = self.param_groups[0].pop(_MEMORY)
        try:
            return super().__repr__()
        finally:
            self.param_groups[0][_MEMORY] = memory

    def _groups(self) -> list[_step.Group]:
        groups = []
        for group in self.param_groups:
            tensors = Tensors([], [], [], [], [], [])
            self._init_group(group, *tensors)
            lion, decoupled = group["use_lion"], group["decoupled_weight_decay"]
            options = Options(
                lion=lion,
                weight_decay=group["weight_decay"],
                coupled=not (lion or decoupled),
                eps=group["eps"],
                nesterov=group["use_nesterov"],
                centralize=group["use_gc"],
                power=self._settings.power,
            )
            lr, (b1, b2) = group["lr"], group["betas"]
            if isinstance(lr, Tensor):
                lr = lr.detach().reshape(())
            elif self._compile and tensors.params:
                # A number would become part of the compiled code, and a schedule compile anew.
                lr = torch.full((), lr, device=tensors.params[0].device)
            groups.append(_step.Group(tensors, options, lr, b1, b2, maximize=group["maximize"]))
        return groups

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        clocks1: list[Tensor],
        clocks2: list[Tensor],
    ) -> None:
        """Fills the lists with what has a gradient, and makes the state that is missing.

        The name and the form are torch's: `torch.compile` runs a method of this name eagerly.
        """
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            _checks.check_grad(grad)
            state = self.state[param]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(param, dtype=self._first_dtype(param))
            params.append(param)
            grads.append(grad)
            exp_avgs.append(state["exp_avg"])
            if group["use_lion"]:
                continue
            if "exp_avg_sq" not in state:
                state["exp_avg_sq"] = torch.zeros_like(param, dtype=compute_dtype(param))
                device = param.device
                if self._settings.power:
                    state["step"] = torch.zeros((), device=device)
                else:
                    state["beta1_product"] = torch.ones((), device=device)
                    state["beta2_product"] = torch.ones((), device=device)
            exp_avg_sqs.append(state["exp_avg_sq"])
            if self._settings.power:
                clocks1.append(state["step"])
            else:
                clocks1.append(state["beta1_product"])
                clocks2.append(state["beta2_product"])

    def _first_dtype(self, param: Tensor) -> torch.dtype:
        if self._settings.momentum_dtype is not None:
            return self._settings.momentum_dtype
        return torch.float32 if param.dtype == torch.float16 else param.dtype

    def _memory(self, groups: list[_step.Group]) -> dict[str, Tensor]:
        """The controller's memory, moved to where the first gradient is."""
        memory = self.param_groups[0][_MEMORY]
        grad = next((g for group in groups for g in group.tensors.grads), None)
        if grad is not None and memory["step"].device != grad.device:
            for name, value in memory.items():
                memory[name] = value.to(grad.device)
        return memory

    def _path(self, device: torch.device) -> tuple[bool, bool]:
        """Whether to take the C library and whether to take foreach calls."""
        foreach = device.type != "cpu" if self._foreach is None else self._foreach
        tracing = torch.compiler.is_compiling() or self._compile
        native = not tracing and self._fused is not False and not self._foreach
        return native and device.type == "cpu" and _native.available(), foreach

    def _run(self) -> Callable[..., None]:
        return _compiled_run() if self._compile else _step.run

    def _restore_state(self, old: dict[Tensor, dict[str, Any]], final: dict[str, Any]) -> None:
        """Undoes the casts of the base class, and keeps tensors that are there already."""
        ours = (param for group in self.param_groups for param in group["params"])
        saved_ids = (i for group in final["param_groups"] for i in group["params"])
        for param, saved_id in zip(ours, saved_ids, strict=True):
            for key, value in final["state"].get(saved_id, {}).items():
                if not isinstance(value, Tensor):
                    continue
                dtype = self._first_dtype(param) if key == "exp_avg" else value.dtype
                target = old.get(param, {}).get(key)
                if target is None or (target.shape, target.dtype) != (value.shape, dtype):
                    target = torch.empty_like(value, dtype=dtype, device=param.device)
                with torch.no_grad():
                    self.state[param][key] = target.copy_(value)


@functools.cache
def _compiled_run() -> Callable[..., None]:
    return torch.compile(_step.run, dynamic=False)
