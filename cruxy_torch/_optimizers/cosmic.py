"""`Cosmic`: as much of Adam's state as a budget of bytes allows, where it serves most."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_control import Law, filters, tiers
from cruxy_control.checks import check_count, check_range
from cruxy_control.law import needs_alignment
from cruxy_control.meta3 import Meta3
from cruxy_control.tiers import MOMENTS, SCALAR, SIGN, Candidate, parse_bytes
from cruxy_torch import _checks, _loading
from cruxy_torch._actuators.apply import DirectedGroup
from cruxy_torch._actuators.moments import Adam
from cruxy_torch._actuators.tiers import Tiered, has_moments, windows
from cruxy_torch._distributed.shards import is_first_rank, shard_elements
from cruxy_torch._kept import compute_dtype
from cruxy_torch._memory.estimate import option_bytes, tensor_bytes
from cruxy_torch._memory.state import (
    AVERAGE_CODES,
    AVERAGE_SCALES,
    SHARD,
    add_average,
    add_moment,
    bits_of,
)
from cruxy_torch._optimizers.directed import DirectedOptimizer
from cruxy_torch._step import is_zero

_AVERAGES = ("step", "grad_fast", "grad_slow")
"""What every tensor has."""


class Cosmic(DirectedOptimizer):
    r"""As much of Adam as fits a budget of bytes, under the Meta3 controller.

    Each tensor is at one of three tiers:

    | tier | update | state of its own |
    |---|---|---|
    | 0 | $0.2\,\mathrm{sign}(g)$ | none |
    | 1 | $0.2\,\mathrm{sign}(g)$ over the tensor's relative size | 4 bytes |
    | 2 | Adam's, as in `CruxyOptimizer` | two moments: 8 bytes a parameter, less in few bits |

    The relative size is that of the tensor's gradient among the tensors of tier 1 in its parameter
    group, from 0.5 to 2. Beside that every tensor has two averages of its gradient's size and a
    counter (12 bytes), from which the plan is made: promotions go where they gain most per byte
    (`cruxy_control.tiers.fill`). The bytes of everything that is kept, the controller and all
    counters included, never exceed the budget. The first plan knows no gradients; after every
    `retier_every` steps the tiers are planned anew. A tensor that keeps its
    tier keeps its state; one that comes to tier 2 starts with empty moments and a bias correction
    of its own.

    The averages also gate each tensor's step: while its gradient is larger than it used to be, the
    step shrinks by that factor, to a tenth at most; a gradient that becomes smaller changes
    nothing. A sign has the size of about an Adam update whatever its gradient, so that one rate
    serves all tiers.

    No step waits for the device but one after which tiers are planned, which reads three numbers a
    tensor.

    Args:
        params: parameters, or parameter groups, as for every `torch.optim` optimizer; names given
            with `model.named_parameters()` (torch 2.6) stand in the log. Groups may set `lr`,
            `betas`, `eps`, `weight_decay`, `maximize`, `state_bits`, `relative_limit`, `averaging`
            and `average_bits` of their own.
        lr: learning rate, at least 0; a number or a tensor of one element.
        state_budget: bytes for all of the state on each rank: a number, or a text such as `"64MB"`
            (a million bytes each) or `"0.5 GiB"`.
        betas: bases of Adam's two decay rates, each in `[0, 1)`, which the controller moves.
        eps: added to the root of the second moment, at least 0.
        weight_decay: decoupled weight decay, at least 0; multiplied by the rate.
        maximize: climbs instead of descending.
        state_bits: 32, 16, 8 or 4 bits an element of the moments; parameters of fewer than 4,096
            elements have 32.
        relative_limit: see `CruxyOptimizer`; `None` for no limit.
        averaging: see `CruxyOptimizer`; `None` keeps no average. Averages count in the budget, and
            every tensor of such a group has one.
        average_bits: see `CruxyOptimizer`.
        retier_every: steps between two plans, at least 1; `None` leaves it to calls of `retier()`.
        hysteresis: at least 0. What a tensor holds already counts `1 + hysteresis` times, which
            keeps two tensors from taking turns.
        log_path: a file to which each new plan is appended as one line of JSON, see `retier`;
            `None` for none.
        log_metrics: appends one JSON line a step to `metrics_path`, see `CruxyOptimizer`.
        metrics_path: that file.
        stochastic_rounding: rounds updates of bfloat16 parameters up or down by chance.
        law: the control law with its constants; not one that steers by the first moment, such as
            `SelfDriving`: some tensors keep none, and the next plan may drop another's.
        lr_bounds: absolute bounds on the rate times its slow factor; `None` for none.
        process_group: see `CruxyOptimizer`.

    Raises:
        ValueError: where an argument is outside its range, or the law steers by the first moment;
            from `step` where the budget is below
            what the lowest tier of every tensor takes (the message says how much that is).
        TypeError: where `state_budget` is no size.

    Examples:
        >>> import torch
        >>> import cruxy_torch
        >>> layer = torch.nn.Linear(64, 64)
        >>> optimizer = cruxy_torch.Cosmic(layer.named_parameters(), lr=1e-3, state_budget="2KB")
        >>> loss = layer(torch.ones(8, 64)).square().mean()
        >>> loss.backward()
        >>> _ = optimizer.step(loss=loss)
        >>> optimizer.tiers()
        {'weight': 1, 'bias': 2}
        >>> cruxy_torch.state_bytes(optimizer) <= 2000
        True
    """

    _pickled = (
        *DirectedOptimizer._pickled,
        *("_budget", "_every", "_hysteresis", "_log_path"),
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        state_budget: int | str = "64MB",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        state_bits: int = 32,
        relative_limit: float | None = None,
        averaging: float | None = None,
        average_bits: int = 32,
        retier_every: int | None = 100,
        hysteresis: float = 0.2,
        log_path: str | Path | None = None,
        log_metrics: bool = False,
        metrics_path: str | Path = "./cruxy_metrics.jsonl",
        stochastic_rounding: bool = True,
        law: Law = Meta3(),
        lr_bounds: tuple[float, float] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if needs_alignment(law):
            raise ValueError(
                "law must not steer by the first moment, which Cosmic keeps of some tensors only "
                f"and may drop at the next plan, got {type(law).__name__}; use Meta3(), or "
                "CruxyOptimizer with state_bits=4."
            )
        self._budget = parse_bytes("state_budget", state_budget)
        if retier_every is not None:
            check_count("retier_every", retier_every, 1, remedy="None leaves it to retier()")
        check_range("hysteresis", hysteresis, 0.0, remedy="0.2 keeps what is nearly as good")
        self._every, self._hysteresis = retier_every, hysteresis
        self._stochastic = stochastic_rounding
        self._log_path = None if log_path is None else Path(log_path)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "state_bits": state_bits,
            "relative_limit": relative_limit,
            "averaging": averaging,
            "average_bits": average_bits,
            "steps": 0,
        }
        super().__init__(
            params,
            defaults,
            law=law,
            lr_bounds=lr_bounds,
            process_group=process_group,
            log_path=metrics_path if log_metrics else None,
        )

    def step(
        self, closure: Callable[[], Any] | None = None, loss: float | Tensor | None = None
    ) -> Any:
        """Updates, as `CruxyOptimizer.step` does; every `retier_every` steps also plans the tiers.

        Args:
            closure: clears gradients, computes the loss, calls `backward` and returns the loss.
            loss: this step's loss, a tensor of one element or a number.

        Returns:
            What the closure returned; without one, `loss`.

        Raises:
            ValueError: where the loss is not one real number, or the budget is too small.
            RuntimeError: where a gradient is sparse.
        """
        fresh = not self.state
        result = super().step(closure, loss)
        if fresh and all(is_zero(group["lr"]) for group in self.param_groups):
            return result  # a tool that makes an optimizer fill its state
        first = self.param_groups[0]
        first["steps"] += 1
        due = self._every is not None and first["steps"] % self._every == 0
        if due and not self._unreal():
            self.retier()
        return result

    def tiers(self) -> dict[str, int]:
        """The tier of every tensor that is trained, by name; empty before the first step."""
        return {name: _tier(self.state[p]) for name, p in self._named() if p in self.state}

    @torch.no_grad()
    def retier(self, state_budget: int | str | None = None) -> dict[str, Any]:
        """Plans the tiers anew from what the averages have seen; waits for the device once.

        `step` calls it every `retier_every` steps; call it between steps for a time of your own.

        Args:
            state_budget: from now on, as in `Cosmic`; `None` keeps the one there is.

        Returns:
            What was done, which is also what is logged: `step`, `budget`, `bytes` (of state, after
            it), `tensors` (how many at each tier), `transitions` (a list of `name`, `from`, `to`,
            `rms`, `bytes`) and `gates` (those below 1, by name). The first plan, made before the
            first step, is logged too, with step 0.

        Raises:
            ValueError: where it is below what the lowest tier of every tensor takes; nothing moves.
            TypeError: where `state_budget` is no size.
        """
        before = self._budget
        if state_budget is not None:
            self._budget = parse_bytes("state_budget", state_budget)
        try:
            return self._plan({name: p for name, p in self._named() if p in self.state})
        except ValueError:
            self._budget = before
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, with the tiers it was saved at.

        Args:
            state_dict: what `state_dict` gave, of an optimizer with the same groups and law.

        Raises:
            ValueError: where groups, law or format differ, or what was saved exceeds the budget.
        """
        _loading.check_form(state_dict)
        saved = tensor_bytes(state_dict["state"]) + option_bytes(self)
        if saved > self._budget:
            raise ValueError(
                f"state_budget must be at least {saved:,} bytes for the state that was saved, got "
                f"{self._budget:,}; give that much, then call retier(state_budget={self._budget})."
            )
        super().load_state_dict(state_dict)

    def _plan_new(self, params: list[Tensor]) -> None:
        """Plans where one of the parameters has its first gradient."""
        if any(p.grad is not None and p not in self.state for p in params):
            self._plan({name: p for name, p in self._named() if p.requires_grad})

    def _plan(self, named: dict[str, Tensor]) -> dict[str, Any]:
        """Plans, moves the tensors to their tiers and logs it; tensors without state get theirs."""
        known = [name for name, p in named.items() if p in self.state]
        seen = self._averages([named[name] for name in known])
        averages = zip(known, seen.slow.value.tolist(), seen.slow.weight.tolist(), strict=True)
        slow = {name: value for name, value, weight in averages if weight > 0.0}
        rms = {name: slow.get(name, 1.0) for name in named}
        squares = {name: slow.get(name, 0.0) ** 2 for name in named}
        before = {
            name: _tier(self.state[p]) if p in self.state else SIGN for name, p in named.items()
        }
        groups = {p: group for group in self.param_groups for p in group["params"]}
        bits = {p: group["state_bits"] for p, group in groups.items()}
        candidates = [_candidate(name, p, bits[p], rms[name]) for name, p in named.items()]
        averaged = [p for p in named.values() if groups[p]["averaging"] is not None]
        fixed = option_bytes(self) + 4 * len(_AVERAGES) * len(named)
        fixed += sum(_average_bytes(p, groups[p]["average_bits"]) for p in averaged)
        after = tiers.fill(
            candidates, self._budget, fixed=fixed, current=before, hysteresis=self._hysteresis
        )
        # What falls makes room for what rises, so that the budget holds at every moment.
        for name in sorted(named, key=lambda name: after[name] - before[name]):
            p = named[name]
            if p not in self.state:
                self.state[p] = _no_averages(p)
            if after[name] != before[name]:
                self.state[p] = _moved(self.state[p], p, after[name], bits[p], squares[name])
        gates = dict(zip(known, tiers.noise_gate(seen, xp=torch).tolist(), strict=True))
        step = self.param_groups[0]["steps"]
        done = tiers.report(
            candidates, before, after, gates, step=step, budget=self._budget, fixed=fixed
        )
        self._append(done)
        return done

    def _append(self, done: dict[str, Any]) -> None:
        if self._log_path is None or not is_first_rank() or self._unreal():
            return
        with self._log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(done, allow_nan=False) + "\n")

    def _unreal(self) -> bool:
        """Whether parameters have no values, as when `estimate_memory` asks."""
        return any(param.is_meta for _, param in self._named())

    def _averages(self, params: list[Tensor]) -> filters.Windows:
        """The averages of some tensors, on the host."""
        if not params:
            nothing = torch.zeros(0, dtype=torch.float32, device="cpu")
            return windows(nothing, nothing, nothing)
        device = params[0].device
        columns = [
            torch.stack([self.state[p][name].to(device, torch.float32) for p in params])
            for name in ("grad_fast", "grad_slow", "step")
        ]
        return windows(*torch.stack(columns).cpu())

    def _check_group(self, group: dict[str, Any]) -> None:
        _checks.check_group(group)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters with their names; group and place where they have none of their own."""
        seen: set[str] = set()
        for index, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for place, param in enumerate(group["params"]):
                name = names[place] if names else f"{index}.{place}"
                name = f"{index}.{name}" if name in seen else name
                seen.add(name)
                yield name, param

    def _group(self, index: int, only: Tensor | None = None) -> DirectedGroup:
        if index == 0 or only is not None:
            # Before any group is put together: a plan may take from tensors of every group.
            self._plan_new([only] if only is not None else [p for _, p in self._named()])
        return super()._group(index, only)

    def _direction_of(self, group: dict[str, Any], moving: Sequence[Tensor] = ()) -> Tiered:
        updated, scale = set(moving), getattr(self, "grad_scale", None)
        still = (self.state[p] for p in group["params"] if p in self.state and p not in updated)
        return Tiered(
            adam=Adam(group["eps"], nesterov=True),
            peers=[state["mean_square"] for state in still if "mean_square" in state],
            unscale=None if scale is None else scale.double().reciprocal().float(),
        )


def _tier(state: dict[str, Any]) -> int:
    """What a tensor has says at which tier it is."""
    if has_moments(state):
        return MOMENTS
    return SCALAR if "mean_square" in state else SIGN


def _moved(
    state: dict[str, Any], param: Tensor, tier: int, bits: int, square: float
) -> dict[str, Any]:
    """What a tensor has on its first step at a tier, in place of what it had."""
    average = (AVERAGE_CODES, AVERAGE_SCALES, SHARD) if AVERAGE_CODES in state else ("average",)
    state = {name: state[name] for name in (*_AVERAGES, *average) if name in state}
    if tier == SCALAR:
        state["mean_square"] = torch.full((), square, dtype=torch.float32, device=param.device)
    elif tier == MOMENTS:
        _add_moments(state, param, bits)
    return state


def _add_moments(state: dict[str, Any], param: Tensor, bits: int) -> None:
    for name in Adam.moments:
        add_moment(state, name, param, compute_dtype(param), bits_of(param, bits))
    for name in Adam.clocks:
        state[name] = torch.ones((), dtype=torch.float32, device=param.device)


def _candidate(name: str, param: Tensor, bits: int, rms: float) -> Candidate:
    """A tensor with what each tier of it takes on a rank."""
    moments: dict[str, Any] = {}
    _add_moments(moments, _like_shard(param), bits_of(param, bits))
    return Candidate(name, param.numel(), (0, 4, tensor_bytes(moments)), rms)


def _average_bytes(param: Tensor, bits: int) -> int:
    """What the average of a tensor takes on a rank."""
    average: dict[str, Any] = {}
    add_average(average, _like_shard(param), bits_of(param, bits))
    return tensor_bytes(average)


def _like_shard(param: Tensor) -> Tensor:
    return torch.empty(shard_elements(param), dtype=param.dtype, device="meta")


def _no_averages(param: Tensor) -> dict[str, Tensor]:
    """What every tensor has, before the first step."""
    start = {"step": torch.int32, "grad_fast": torch.float32, "grad_slow": torch.float32}
    return {
        name: torch.zeros((), dtype=dtype, device=param.device) for name, dtype in start.items()
    }
