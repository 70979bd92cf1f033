"""`AXIOM`: memory first. A factored second moment, momentum in 4 bits or none, relative steps."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from cruxy_control import Law
from cruxy_control.checks import check_count, check_range
from cruxy_control.formulas.factored import BOOST_LIMIT
from cruxy_control.law import needs_alignment
from cruxy_control.meta3 import Meta3
from cruxy_torch import _checks
from cruxy_torch._actuators.apply import DirectedGroup
from cruxy_torch._actuators.axiom import FactoredDirection
from cruxy_torch._diagnose import names_of
from cruxy_torch._memory.estimate import nbytes, state_bytes
from cruxy_torch._memory.state import bits_of
from cruxy_torch._optimizers.directed import DirectedOptimizer
from cruxy_torch._sensors import anomaly

_USUAL_MOMENTUM = 0.9
"""Where something needs momentum and nobody said how much."""


class AXIOM(DirectedOptimizer):
    r"""The least state an optimizer needs: under 0.03 bytes a parameter on matrices.

    The second moment of a matrix is kept as one row and one column of means (Adafactor), and
    momentum in 4 bits or, by default, not at all. With `register_hooks()` gradients cost the
    largest of them instead of all. Together with parameters in bfloat16, whose updates are rounded
    up or down by chance so that small ones still count, a model trains in little more than
    its own weights.

    The controller is `CruxyOptimizer`'s, but for its clip: a tensor's step is limited by
    `clip_rms` instead, unless `law` has a threshold. On a steady gradient it runs at 0.75 of the
    rate that was set, and `beta1` and `beta2` are not the law's. Without momentum each step is as
    noisy as its gradient: end with a small rate, or give `momentum`.

    $$
    \begin{aligned}
    v_t &= \beta_t v_{t-1} + (1 - \beta_t) g_t^2, \qquad \beta_t = 1 - t^{-0.8}, \qquad
    u_t = g_t / \sqrt{\tilde v_t} \\
    u_t &\leftarrow u_t / \max(1, \mathrm{rms}(u_t) / d), \qquad
    m_t = \beta_1 m_{t-1} + (1 - \beta_1) u_t \\
    \theta_t &= \theta_{t-1} - \eta_t (\rho \, \hat m_t + \lambda \theta_{t-1}), \qquad
    \rho = \max(10^{-3}, \mathrm{rms}(\theta_{t-1}))
    \end{aligned}
    $$

    with $\tilde v$ the outer product of row and column over the mean of either, $d$ `clip_rms`,
    $\hat m = m_t / (1 - \beta_1^t)$ (`u` itself without momentum), and $\rho = 1$ without
    `relative_step`.

    A step whose gradient is not finite is skipped. No step waits for the device. Parameters sharded
    as `DTensor` give what whole ones would.

    Args:
        params: parameters, or parameter groups, as for every `torch.optim` optimizer. Groups may
            set every argument up to `average_bits` of their own.
        lr: learning rate, at least 0; a number or a tensor of one element.
        weight_decay: decoupled weight decay, at least 0; multiplied by the rate.
        max_grad_norm: scales the gradients so that their norm, over all parameters, is at most
            this, above 0; the sensors see them as they are. With `register_hooks()` each tensor is
            scaled by its own norm, since a gradient is gone before the norm of all is known. `None`
            for no such bound.
        detect_anomaly: raises `FloatingPointError` with the names of the gradients that are not
            finite and how many of their elements, at the price of one wait for the device a step.
            Nothing has moved then; with `register_hooks()` other tensors may have. `False` skips
            such a step and counts it. Under a `GradScaler`, which expects infinities, it is skipped
            too.
        streak_boost: up to this factor, in `[1, 1.5]`, for coordinates whose sign persists; needs
            momentum. 1 is none.
        snr_floor: rows (along the last axis) whose signal-to-noise ratio `m^2 / v` is below this,
            in `[0, 1)`, are damped in proportion; needs momentum. Noise alone has
            `(1 - momentum) / (1 + momentum)`, 0.053 at 0.9. 0 is none.
        momentum: decay rate of the average of the normalised gradient, in `[0, 1)`; 0 keeps none.
            0.9 costs 0.51 bytes a parameter in 4 bits. `None` is 0.9 in groups with a
            `streak_boost` or `snr_floor`, and 0 in others.
        momentum_bits: 4, 8, 16 (bfloat16) or 32. Parameters of fewer than 4,096 elements keep it in
            float32. What is below 32 bits is rounded up or down by chance.
        relative_step: multiplies each tensor's step by the root mean square of the tensor, so that
            the rate is a share of the weights: about 1e-2.
        decay_rate: exponent of the second moment's decay, in `(0, 1]`.
        power: of the root in `u`, in `[0, 1]`: `g / v^(power / 2)` (Padam). Below 1 the size of `u`
            is no longer about 1 but about `|g|^(1 - power)`: the rate is then one for gradients of
            this size, and `clip_rms` limits `u` from above alone. No measurement speaks for it.
        clip_rms: the largest root mean square of a tensor's normalised gradient, above 0; `None`
            for no limit.
        min_dim_size_to_factor: a tensor is factored over its two largest axes where both are at
            least this long; others keep a whole second moment, at 4 bytes a parameter.
        maximize: climbs instead of descending.
        relative_limit: see `CruxyOptimizer`; `None` for no limit.
        averaging: see `CruxyOptimizer`; `None` keeps no average. It is as large as the parameters
            in float32, or smaller by `average_bits`.
        average_bits: see `CruxyOptimizer`.
        stochastic_rounding: rounds updates of bfloat16 parameters up or down by chance, with the
            right odds; otherwise an update below half a step of bfloat16 is lost.
        law: the control law with its constants. One that steers by the first moment, such as
            `SelfDriving`, needs `momentum` in every group, and a `relative_limit` where the rate
            may start too high.
        lr_bounds: absolute bounds on the rate times its slow factor; `None` for none.
        process_group: see `CruxyOptimizer`.

    Raises:
        ValueError: where an argument is outside its range, or `streak_boost`, `snr_floor` or the
            law finds no momentum.
        FloatingPointError: from `step` under `detect_anomaly`.

    Examples:
        >>> import torch
        >>> import cruxy_torch
        >>> layer = torch.nn.Linear(512, 512)
        >>> optimizer = cruxy_torch.AXIOM(layer.parameters(), lr=1e-3)
        >>> optimizer.register_hooks()
        >>> for _ in range(3):
        ...     loss = layer(torch.ones(8, 512)).square().mean()
        ...     loss.backward()  # updates, and frees each gradient
        ...     _ = optimizer.step(loss=loss)
        >>> layer.weight.grad is None
        True
        >>> usage = optimizer.memory_usage()
        >>> usage["parameters"], usage["gradients"], usage["state"] < 0.04 * 512 * 513
        (1050624, 0, True)

    References:
        Shazeer and Stern, [Adafactor: Adaptive Learning Rates with Sublinear Memory
        Cost](https://arxiv.org/abs/1804.04235), 2018; Lv et al., [Full Parameter Fine-tuning for
        Large Language Models with Limited Resources](https://arxiv.org/abs/2306.09782), 2023, for
        updates inside the backward pass; Chen et al., [Padam](https://arxiv.org/abs/1806.06763),
        2018, for `power`.
    """

    _pickled = (*DirectedOptimizer._pickled, "_detects")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = None,
        detect_anomaly: bool = False,
        streak_boost: float = 1.0,
        snr_floor: float = 0.0,
        *,
        momentum: float | None = None,
        momentum_bits: int = 4,
        relative_step: bool = False,
        decay_rate: float = 0.8,
        power: float = 1.0,
        clip_rms: float | None = 1.0,
        min_dim_size_to_factor: int = 32,
        maximize: bool = False,
        relative_limit: float | None = None,
        averaging: float | None = None,
        average_bits: int = 32,
        stochastic_rounding: bool = True,
        law: Law = Meta3(clip_threshold=None),
        lr_bounds: tuple[float, float] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if max_grad_norm is not None:
            ends = {"lower_open": True, "upper_open": True}
            remedy = "1 is usual, None is no bound"
            check_range("max_grad_norm", max_grad_norm, 0.0, math.inf, **ends, remedy=remedy)
        self._stochastic, self._detects = stochastic_rounding, bool(detect_anomaly)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "momentum_bits": momentum_bits,
            "weight_decay": weight_decay,
            "relative_step": relative_step,
            "decay_rate": decay_rate,
            "power": power,
            "clip_rms": clip_rms,
            "min_dim_size_to_factor": min_dim_size_to_factor,
            "streak_boost": streak_boost,
            "snr_floor": snr_floor,
            "maximize": maximize,
            "relative_limit": relative_limit,
            "averaging": averaging,
            "average_bits": average_bits,
        }
        super().__init__(
            params, defaults, law=law, lr_bounds=lr_bounds, process_group=process_group
        )
        self._settings = dataclasses.replace(self._settings, max_grad_norm=max_grad_norm)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group with options of its own; the one controller sees its gradients too."""
        options = {**self.defaults, **param_group}
        if options["momentum"] is None:
            needs = options["streak_boost"] > 1.0 or options["snr_floor"] > 0.0
            param_group = {**param_group, "momentum": _USUAL_MOMENTUM if needs else 0.0}
        super().add_param_group(param_group)

    def register_hooks(self, lr_scale: float = 1.0) -> None:
        """Like `CruxyOptimizer.register_hooks`.

        Args:
            lr_scale: kept for code that gives one. It multiplies nothing, and another value than 1
                warns: gradients here are exact, and there is no loss of size to make up for.
        """
        if lr_scale != 1.0:
            warnings.warn(
                f"lr_scale={lr_scale} is ignored: released gradients are exact, so that the rate "
                "needs no factor; leave it out.",
                stacklevel=2,
            )
        super().register_hooks()

    def get_lr(self) -> float:
        """The learning rate of the first group, as the user or a scheduler set it.

        What the controller makes of it is `telemetry()["learning_rate"]`.
        """
        return float(self.param_groups[0]["lr"])

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of every group.

        Args:
            lr: at least 0.

        Raises:
            ValueError: where it is not.
        """
        _checks.check_lr(lr)
        for group in self.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def memory_usage(self) -> dict[str, int]:
        """Bytes held on this rank now.

        Returns:
            `parameters`, `gradients` (those alive), `state` (the controller included), and `total`.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        usage = {
            "parameters": sum(map(nbytes, params)),
            "gradients": sum(nbytes(p.grad) for p in params if p.grad is not None),
            "state": state_bytes(self),
        }
        return usage | {"total": sum(usage.values())}

    def step(
        self, closure: Callable[[], Any] | None = None, loss: float | Tensor | None = None
    ) -> Any:
        """Measures, asks the law, and updates every parameter that has a gradient.

        Args:
            closure: clears gradients, computes the loss, calls `backward` and returns the loss.
            loss: this step's loss, a tensor of one element or a number.

        Returns:
            What the closure returned; without one, `loss`.

        Raises:
            ValueError: where the loss is not one real number.
            RuntimeError: where a gradient is sparse.
            FloatingPointError: under `detect_anomaly`, where a gradient is not finite.
        """
        result = super().step(closure, loss)
        self._raise_if_any()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and what a backward pass with registered hooks has left open.

        Args:
            set_to_none: frees the gradients instead of filling them with zeros.
        """
        super().zero_grad(set_to_none)
        self._counts = {}

    def _forget(self) -> None:
        super()._forget()
        self._counts: dict[Tensor, Tensor] = {}

    def _step_all(self, losses: list[float | Tensor]) -> bool:
        if self._detects and getattr(self, "found_inf", None) is None:
            for param in (p for group in self.param_groups for p in group["params"]):
                if param.grad is not None:
                    self._counts[param] = anomaly.nonfinite(_checks.dense_grad(param))
            self._raise_if_any()
        return super()._step_all(losses)

    def _group(self, index: int, only: Tensor | None = None) -> DirectedGroup:
        if self._detects and only is not None:  # released in the backward pass
            self._counts[only] = anomaly.nonfinite(_checks.dense_grad(only))
        return super()._group(index, only)

    def _raise_if_any(self) -> None:
        """Raises where a gradient that was counted is not finite, and forgets them all."""
        counts, self._counts = self._counts, {}
        if counts and not next(iter(counts)).is_meta:
            params = list(counts)
            anomaly.raise_if_any(list(counts.values()), params, params, names_of(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_detects", False)
        for group in self.param_groups:
            group.setdefault("power", 1.0)

    def _check_group(self, group: dict[str, Any]) -> None:
        _checks.check_shared(group)
        remedy = "0.9 is usual, 0 is none"
        check_range("momentum", group["momentum"], 0.0, 1.0, upper_open=True, remedy=remedy)
        _checks.check_bits("momentum_bits", group["momentum_bits"])
        remedy = "0.8 is the default"
        check_range("decay_rate", group["decay_rate"], 0.0, 1.0, lower_open=True, remedy=remedy)
        remedy = "1 is Adafactor's, 0 no preconditioner"
        check_range("power", group["power"], 0.0, 1.0, remedy=remedy)
        if group["clip_rms"] is not None:
            remedy = "1 is Adafactor's, None switches it off"
            check_range("clip_rms", group["clip_rms"], 0.0, lower_open=True, remedy=remedy)
        smallest = group["min_dim_size_to_factor"]
        check_count("min_dim_size_to_factor", smallest, 2, remedy="32 factors nearly every matrix")
        boost, floor = group["streak_boost"], group["snr_floor"]
        check_range("streak_boost", boost, 1.0, BOOST_LIMIT, remedy="1 switches it off")
        check_range("snr_floor", floor, 0.0, 1.0, upper_open=True, remedy="0 switches it off")
        for name, used in (("streak_boost", boost > 1.0), ("snr_floor", floor > 0.0)):
            if used and not group["momentum"]:
                raise ValueError(
                    f"{name} needs momentum, got momentum={group['momentum']!r}; set momentum=0.9."
                )
        law = self._settings.law
        if needs_alignment(law) and not group["momentum"]:
            raise ValueError(
                f"law must not steer by the first moment, of which AXIOM keeps none without "
                f"momentum, got {type(law).__name__}; set momentum=0.9, or use Meta3()."
            )

    def _bits(self, group: dict[str, Any], param: Tensor | None = None) -> int:
        bits = group["momentum_bits"]
        return bits if param is None else bits_of(param, bits)

    def _direction_of(
        self, group: dict[str, Any], moving: Sequence[Tensor] = ()
    ) -> FactoredDirection:
        names = [field.name for field in dataclasses.fields(FactoredDirection)]
        return FactoredDirection(**{name: group[name] for name in names})
