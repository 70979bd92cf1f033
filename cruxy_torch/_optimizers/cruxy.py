"""`CruxyOptimizer`: the control law around Adam, Lion and other directions, called like AdamW."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_control import Law
from cruxy_control.law import needs_alignment
from cruxy_torch import _checks, _step
from cruxy_torch._actuators.direction import Direction
from cruxy_torch._actuators.moments import Adam, Lion
from cruxy_torch._actuators.orthogonal import Orthogonal
from cruxy_torch._actuators.stepped import Frame
from cruxy_torch._memory.state import warn_of_small
from cruxy_torch._native.fit import Passes
from cruxy_torch._optimizers import muon, usual, voting
from cruxy_torch._optimizers.directed import DirectedOptimizer
from cruxy_torch._optimizers.modes import LIONS, Mode, law_of, refuse_of_adamw
from cruxy_torch.backends import fastest


class CruxyOptimizer(DirectedOptimizer):
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
    `use_nesterov`, `use_lion`, `use_gc`, `maximize`, `state_bits`, `relative_limit`, `averaging`
    and `average_bits` of their own; `betas` and `relative_limit` that are said nowhere go with a
    group's own `use_lion`. One controller sees them all, under self-driving that which goes with
    Lion where any of the first groups takes it.

    `mode="self_driving"` needs no learning rate: `lr` is only where the search for one starts.
    Evaluate and save under `with optimizer.averaged():`; see `cruxy_optax.self_driving`.
    `direction` puts a direction of your own in the place of Adam's.

    Three options save memory: `state_bits` keeps moments in fewer bits, `register_hooks` releases
    each gradient inside `backward`, `stochastic_rounding` lets bfloat16 parameters learn.

    On CPU, float32 tensors take a small C library that is built on the first step where there is
    a C compiler (about a second, once per machine); on CUDA devices float32 and bfloat16 tensors
    take Triton, many to a launch; everything else takes torch's own operations.
    No step waits for the device. Under `torch.compile` give `lr` as a tensor; where there is a
    `direction`, `compile=True` is the way.

    Args:
        params: parameters, or parameter groups, as for every `torch.optim` optimizer.
        lr: learning rate, at least 0; a number or a tensor of one element. About 1e-3 for Adam and
            1e-4 for Lion. Under `mode="self_driving"` above 0, the start of the search.
        betas: bases of the two decay rates, each in `[0, 1)`, which the controller moves; under
            `direction="muon"` those of what is no matrix (a group of matrices may set its own). The
            default is (0.9, 0.999), that of `cruxy` 2.1.0, with `use_lion` too; Lion's authors use
            (0.9, 0.99). Under `mode="self_driving"`, which leaves them alone, it is (0.9, 0.99),
            with `use_lion` (0.9, 0.95).
        eps: added to the root of the second moment, at least 0.
        weight_decay: its coefficient, at least 0. `None` is 0.01, and 0.1 under self-driving, which
            spares tensors of fewer than two axes in groups that do not say a decay of their own.
        amsgrad: must be false.
        mode: `"meta3"`, `"self_driving"`, `"stability_v2"` or `"stability_v1"`; `"meta_lion"` and
            `"self_driving_lion"` are the first two with `use_lion=True`.
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
        log_metrics: appends one JSON line a step to `metrics_path`: `step`, `timestamp` and the
            telemetry. Written every 100 steps and at the end; `null` where a number is not finite;
            under `torch.distributed` by rank 0 alone.
        metrics_path: that file.
        compile: compiles the whole step with `torch.compile`; the first step then takes seconds.
        law: a law with constants of one's own, in place of `mode` and its four constants.
        lr_bounds: absolute bounds on the rate times its slow factor; `None` for none. They change
            what was asked for; `cruxy` 2.1.0 has (1e-7, 1e-2).
        momentum_dtype: dtype of the first moment. `None` is the parameter's, but float32 for
            float16; `torch.bfloat16` halves Lion's state. The second moment is float32 always
            (float64 for float64 parameters).
        direction: what a gradient becomes, in the place of Adam's or Lion's direction. `"muon"`
            makes matrices inside the model orthogonal (`cruxy_torch.Orthogonal`) and leaves Adam to
            embeddings, output layers and vectors: it has to know what each parameter is, from the
            groups of `cruxy_torch.param_groups(model, ...)`. A group with `"stacked": True` is of
            parameters whose first axis counts layers.
        total_steps: steps of the run, where they are known, under `mode="self_driving"`: the rate
            is found in the first fifth of them and then falls to 0 from twice of it, under twice
            the relative limit, with Muon inside in the last fifth, from the rate itself; `cooldown`
            begins that at any step. `None` for a run without end.
        maximize: climbs instead of descending.
        foreach: torch's foreach operations for all tensors; by default on every device but the CPU,
            for what no library takes.
        fused: the C library on CPU, Triton on CUDA devices. `None` takes them where they are there
            and the tensors fit, or what `use_backend` says; `True` insists on one of them, `False`
            does without. See `backend`.
        capturable: kept for code that looks for it: a step can always be captured in a CUDA graph.
        differentiable: must be false.
        state_bits: bits an element in which moments are kept between steps: 32; 16 for bfloat16; 8
            or 4 for codes with a scale for every 256 elements (`cruxy_exact.codes.BlockCode`),
            1.01 or 0.51 bytes an element and moment. Each step is computed in float32, and what is
            kept of it is rounded up or down by chance, so that what is less than a step of the code
            counts on average. Parameters of fewer than 4,096 elements keep float32. Loading brings
            the bits that were saved.
        select: tells by a parameter whether its moments may be kept in fewer bits; `None` for all.
            Embeddings and output layers are what is most often left in full precision.
        stochastic_rounding: rounds bfloat16 parameters up or down by chance, so that steps smaller
            than half of their last place count on average: at a rate of 1e-3 the nearest bfloat16
            to a weight of 1 is the same weight again. All random bits follow from the number of the
            step in the state, so that a run can be repeated.
        relative_limit: no tensor gets a rate above this share of its own root mean square (which
            counts as at least 0.01), or of that of all parameters (those that have a gradient and
            a limit, of all groups) where that is smaller; above 0, `None` for no limit. Of tensors
            wider than 64, Lion's than 384, it falls with the root of their width, Muon's of none.
            The default is none, in self-driving 0.1, with Lion 0.01, with `direction="muon"` 0.2.
        averaging: keeps the average of the parameters over the run, for `averaged`, with this
            power: step `t` has the weight `(averaging + 1) / (t + averaging)`, so that about the
            last `1 / (averaging + 1)` of the run counts. At least 0; `None` keeps none and saves
            its buffer. The default is none, but 16 under `mode="self_driving"`.
        average_bits: bits an element of that average: 32; 16 or 8 for its lowest digits, read
            beside the parameter (`cruxy_exact.NearCode`), 2.01 or 1.01 bytes an element. It
            is rounded by chance where it moves, and kept in float32 where a parameter has fewer
            than 4,096 elements. Whoever changes parameters by more than steps do changes such an
            average with them. Loading brings the bits that were saved.
        interpolation: how far the average pulls the parameters along, in `[0, 1)`, see
            `cruxy_optax.average_iterates`: schedule-free averaging. It is 0, but 0.7 under
            self-driving with `direction="muon"` where neither `law` nor `averaging` is given. While
            a scheduler lowers the rate nothing is pulled. For language models with Adam's
            direction, 0.6.
        process_group: ranks that hold the same gradients, as under `DistributedDataParallel`, but
            pass a loss of their own: one all-reduce a step keeps their controllers alike, and a
            rank may have no loss. `fully_shard` needs none: its mesh is used. Not pickled.
        vote: ranks that vote on the sign of each element of Lion's update, each from gradients and
            a momentum of its own: a bit an element in place of an all-reduce of gradients, which is
            switched off by `local_gradients_hook`. The law sees the mean over ranks of the sums of
            squares. All ranks need gradients of the same parameters, and save a state each; see
            `merge_votes` for a change in their number.

    Raises:
        ValueError: where an argument is outside its range or two exclude each other.
        TypeError: where an argument has the wrong type, such as a law's class for an instance.
        RuntimeError: where `fused=True` and neither library is there; from `step` where a gradient
            is sparse.

    Examples:
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

    _pickled = (
        *DirectedOptimizer._pickled,
        *("_momentum_dtype", "_direction", "_select", "_foreach", "_fused", "_compile"),
        *("_kind", "_given"),
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float | None = None,
        amsgrad: bool = False,
        *,
        mode: Mode = "meta3",
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
        law: Law | None = None,
        lr_bounds: tuple[float, float] | None = None,
        momentum_dtype: torch.dtype | None = None,
        direction: Direction | Literal["muon"] | None = None,
        total_steps: int | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = True,
        differentiable: bool = False,
        state_bits: int = 32,
        select: Callable[[Tensor], bool] | None = None,
        stochastic_rounding: bool = False,
        relative_limit: float | Literal["mode"] | None = "mode",
        averaging: float | Literal["mode"] | None = "mode",
        average_bits: int = 32,
        interpolation: float | Literal["mode"] = "mode",
        process_group: dist.ProcessGroup | None = None,
        vote: dist.ProcessGroup | None = None,
    ) -> None:
        refuse_of_adamw(betas, amsgrad)
        named, use_lion = LIONS.get(mode, mode), use_lion or mode in LIONS
        params = params if isinstance(params, Tensor) else list(params)
        kind, free = usual.kind_of_all(direction, params, lion=use_lion), law is None
        self._kind = kind if free else None
        if law is None:
            law = law_of(named, gamma_norm, meta_lr_eta, meta_lr_beta2, meta_interval)
        averaging, interpolation = usual.average_of(law, kind, averaging, interpolation, free=free)
        if free:
            law = usual.with_usual(law, kind, ends=False, interpolation=interpolation)
        _checks.check_choices(
            momentum_dtype, state_bits, select, foreach, fused, compile, differentiable
        )
        usual.check_direction(direction, law, use_lion=use_lion)
        voting.check(vote, process_group, direction, compile=compile)
        driving = needs_alignment(law)
        self._given = usual.given(betas, weight_decay, relative_limit)
        self._momentum_dtype, self._direction = momentum_dtype, direction
        self._select, self._stochastic = select, stochastic_rounding
        self._foreach, self._fused, self._compile = foreach, fused, compile
        self._vote = vote
        defaults = {
            "lr": lr,
            **usual.options_of(direction, lion=use_lion, driving=driving),
            **self._given,
            "eps": eps,
            "decay_vectors": not driving,
            "decoupled_weight_decay": decoupled_weight_decay,
            "use_nesterov": use_nesterov,
            "use_lion": use_lion,
            "use_gc": use_gc,
            "maximize": maximize,
            "state_bits": state_bits,
            "averaging": averaging,
            "average_bits": average_bits,
            "interpolation": interpolation,
            "capturable": capturable,
            "ends": False,  # whether the end was known before the first step
        }
        if direction is not None:  # a state of another direction is then refused
            defaults["direction"] = direction if direction == "muon" else type(direction).__name__
        if vote is not None:
            defaults["direction"] = voting.name_of(vote)
        super().__init__(
            params,
            defaults,
            law=law,
            lr_bounds=lr_bounds,
            process_group=process_group if vote is None else vote,
            log_path=metrics_path if log_metrics else None,
        )
        if total_steps is not None:
            self.set_total_steps(total_steps)
        warn_of_small(self.param_groups, stacklevel=2)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_vote", None)
        for group in self.param_groups:
            group.setdefault("state_bits", 32)
            group.setdefault("interpolation", 0.0)
            group.setdefault("decay_vectors", True)
            group.setdefault("ends", False)
        self.__dict__.setdefault("_kind", None)
        self.__dict__.setdefault("_given", dict(self.defaults))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group with options of its own; the one controller sees its gradients too."""
        if "weight_decay" in param_group:
            param_group = {"decay_vectors": True, **param_group}
        if self._direction == "muon":
            param_group = muon.with_betas(
                param_group, self.defaults["use_nesterov"], self.defaults["interpolation"]
            )
        lion = param_group.get("use_lion", self.defaults["use_lion"])
        own = usual.options_of(self._direction, lion=lion, driving=self.finds_rate)
        super().add_param_group({**own, **self._given, **param_group})

    def set_total_steps(self, steps: int) -> None:
        """See `DirectedOptimizer`; the set point moves too where a run knew it from the start."""
        super().set_total_steps(steps)
        if int(self._law()["step"]) == 0:
            for group in self.param_groups:
                group["ends"] = True
        if self._kind is not None and any(group.get("ends") for group in self.param_groups):
            pull, law = self.defaults["interpolation"], self._settings.law
            law = usual.with_usual(law, self._kind, ends=True, interpolation=pull)
            self._settings = dataclasses.replace(self._settings, law=law)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads as torch's optimizers do; where ranks vote, this rank's state or the merged one."""
        own = state_dict if self._vote is None else voting.own_state(state_dict, self._vote)
        super().load_state_dict(own)

    def _check_group(self, group: dict[str, Any]) -> None:
        _checks.check_group(group)
        if self._vote is not None:
            voting.check_group(group)
        if self._direction == "muon":
            muon.check_group(group)
        elif self._direction is not None:
            usual.refuse_lion(self._direction, group["use_lion"])

    def _direction_of(self, group: dict[str, Any], moving: Sequence[Tensor] = ()) -> Direction:
        if self._direction == "muon" and muon.is_orthogonal(group):
            experts = group["role"].startswith("moe.expert")
            return Orthogonal(stacked=muon.is_stacked(group) + experts)
        if isinstance(self._direction, Direction):
            return self._direction
        if group["use_lion"]:
            return voting.direction(self._vote, group, self._frame(group)) or Lion()
        return Adam(group["eps"], group["use_nesterov"])

    def _limit_width(self, group: dict[str, Any]) -> int | None:
        return usual.limit_width(self._direction, lion=group["use_lion"])

    def _frame(self, group: dict[str, Any]) -> Frame:
        return Frame(
            weight_decay=group["weight_decay"],
            coupled=not (group["use_lion"] or group["decoupled_weight_decay"]),
            centralize=group["use_gc"],
            decay_vectors=group["decay_vectors"],
        )

    def _options(self, group: dict[str, Any], moving: Sequence[Tensor]) -> dict[str, Any]:
        if not self._compile or not moving or isinstance(group["lr"], Tensor):
            return group
        # A number would become part of the compiled code, and a schedule compile anew.
        lr = torch.full((), group["lr"], dtype=torch.float32, device=moving[0].device)
        return {**group, "lr": lr}

    def _bits(self, group: dict[str, Any], param: Tensor | None = None) -> int:
        chosen = param is None or self._select is None or self._select(param)
        return super()._bits(group, param) if chosen else 32

    def _moment_dtype(self, param: Tensor, name: str) -> torch.dtype:
        if name != "exp_avg":
            return super()._moment_dtype(param, name)
        if self._momentum_dtype is not None:
            return self._momentum_dtype
        return torch.float32 if param.dtype == torch.float16 else param.dtype

    def _saved_dtype(self, param: Tensor, group: dict[str, Any]) -> torch.dtype | None:
        return None if group["state_bits"] == 16 else self._moment_dtype(param, "exp_avg")

    def _path(self, device: torch.device) -> tuple[Passes | None, bool]:
        if self._foreach is None and self._fused is None and not self._compile:
            return super()._path(device)
        foreach = device.type != "cpu" if self._foreach is None else self._foreach
        tracing = torch.compiler.is_compiling() or self._compile
        native = not tracing and self._fused is not False and not self._foreach
        return fastest(device) if native else None, foreach

    def _run(self) -> Callable[..., None]:
        return _compiled_run() if self._compile else _step.run


@functools.cache
def _compiled_run() -> Callable[..., None]:
    return torch.compile(_step.run, dynamic=False)
