"""`debug_check`: sizes by role, what binds, and the name of the tensor with the NaN."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy
import torch
from torch import Tensor, nn

from cruxy_control import meta_learning_rate
from cruxy_control.controls import neutral
from cruxy_control.diagnosis import (
    MEASURED,
    NonFinite,
    RoleCheck,
    Stats,
    TensorCheck,
    by_role,
    headline,
    pooled,
    report,
)
from cruxy_control.explanation import explain
from cruxy_control.formulas.limits import RELATIVE_FLOOR, relative_limit
from cruxy_control.roles import Rule, check_rules
from cruxy_control.signals import NOT_KNOWN
from cruxy_torch import _checks, _scalar_numpy, _telemetry
from cruxy_torch._blocks import blocks, by_device
from cruxy_torch._distributed.shards import add_shards, local
from cruxy_torch._groups import limit_shares
from cruxy_torch._law_state import REPORT
from cruxy_torch._memory.state import SHAPED, value_of
from cruxy_torch._roles.parameters import find

if TYPE_CHECKING:
    from cruxy_torch._controlled_optimizer import ControlledOptimizer


class DebugCheck:
    """What `debug_check` found; printed, a table by role.

    Entered with `with`, it looks again at the end of the block and then knows the update too: by
    how much the block has moved each parameter. Inside the block it keeps a copy of the parameters.

    Attributes:
        tensors: what was measured of every tensor, in the order of the groups.
        nonfinite: the name of every tensor that holds something that is not finite, in what of it,
            and how much.
        telemetry: what the optimizer's `telemetry()` gives.
    """

    tensors: tuple[TensorCheck, ...]
    nonfinite: tuple[NonFinite, ...]
    telemetry: dict[str, float | int | bool]

    def __init__(
        self, optimizer: "ControlledOptimizer", model: nn.Module | None, rules: Sequence[Rule]
    ) -> None:
        self._optimizer, self._model, self._rules = optimizer, model, rules
        self._before: dict[Tensor, Tensor] = {}
        self._look()

    @property
    def roles(self) -> dict[str, RoleCheck]:
        """The same by role."""
        return by_role(self.tensors)

    @property
    def clip_binds(self) -> bool:
        """Whether the last step scaled the gradient down."""
        return self.telemetry.get("clip_scale", 1.0) < 1.0

    @property
    def limited(self) -> tuple[str, ...]:
        """The names of the tensors that move by their relative limit instead of the rate."""
        return tuple(tensor.name for tensor in self.tensors if tensor.limited)

    def __enter__(self) -> Self:
        rows = _rows(self._optimizer, self._model, self._rules)
        moved = [row.param for row in rows if row.group is not None]
        self._before = {param: local(param.detach()).clone() for param in moved}
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is None:
            self._look()
        self._before = {}

    def __repr__(self) -> str:
        count = len(self.limited)
        limited = f"relative limit binds on {count} of {len(self.tensors)} tensors" if count else ""
        return report(self.tensors, self.nonfinite, [headline(self.telemetry, limited)])

    @torch.no_grad()
    def _look(self) -> None:
        optimizer = self._optimizer
        rows = _rows(optimizer, self._model, self._rules)
        seen = [*_look_at(rows, optimizer, self._before), *_look_beside(optimizer, self._model)]
        stats, report, rates = _on_host(seen, optimizer)
        values: list[dict[str, Stats]] = [{} for _ in rows]
        bad: list[NonFinite] = []
        for one, stat in zip(seen, stats, strict=True):
            if one.row is not None and one.column:
                values[one.row][one.where] = stat
            if stat.nonfinite:
                name = one.name if one.row is None else rows[one.row].name
                bad.append(NonFinite(name, one.where, stat.nonfinite, stat.elements))
        last = dict(zip(REPORT, report, strict=False))
        applied = [_applied(rate, last, optimizer) for rate in rates]
        tensors = []
        for row, found, limit in zip(rows, values, _limits(rows, values, optimizer), strict=True):
            rate = math.nan if row.group is None else applied[row.group]
            check = TensorCheck(row.name, row.role, found, min(rate, limit), limit < rate)
            tensors.append(check)
        self.tensors, self.nonfinite = tuple(tensors), tuple(bad)
        self.telemetry = _telemetry.named(report, optimizer._shown())


class Diagnosed:
    """An optimizer that can be asked how it is: see `explain` and `debug_check`."""

    def explain(self: Any) -> str:
        """Says in sentences what the controller does: where the run is, what sets the rate, why.

        Waits for the device once, as `telemetry`, of whose values it speaks.

        Examples:
            >>> import torch
            >>> from cruxy_torch import CruxyOptimizer
            >>> x = torch.nn.Parameter(torch.ones(3))
            >>> CruxyOptimizer([x], mode="self_driving").explain()
            'No step was taken yet.'
        """
        return explain(self.telemetry())

    def debug_check(
        self: Any, model: nn.Module | None = None, *, rules: Iterable[Rule] = ()
    ) -> DebugCheck:
        """Sizes by role, what binds, and the name of every tensor with a NaN or an infinity.

        Printed, it is a table with a line a role: root mean squares of parameters, of the gradients
        that are there, and of what the optimizer keeps of each (moments, averages; low-bit state
        decoded), the rate that they move by, how many a relative limit holds back, and how many
        numbers are not finite. Above it stand the rate and the clip of the last step, below it the
        names.

        Called by itself it shows no update, of which nothing is kept. As a block around a step, or
        around several, it does, with its ratio to the parameter:

            with optimizer.debug_check() as check:
                optimizer.step(loss=loss)
            print(check)

        Nothing changes by looking. Everything is read from the device in one go, which waits for
        it. Of a `DTensor` the whole is measured, over all ranks, which all have to call it.
        Gradients are as they lie there: before clipping, and multiplied by the scale of a
        `GradScaler`. A root mean square is that of the finite numbers.

        Args:
            model: gives names, and roles where `param_groups` gave none; what it has beside the
                optimizer's parameters is looked at too, such as frozen parameters and running
                means. Without it names are those that came with `model.named_parameters()` (torch
                2.6) if each parameter of the group has one, and else both say the group.
            rules: of roles, which come before all else; see `label_roles`.

        Returns:
            A `DebugCheck`: `tensors`, `roles`, `nonfinite`, `telemetry`, `clip_binds`, `limited`.

        Raises:
            TypeError: where `model` is no module.
            ValueError: where a parameter is on the `meta` device and has no values, or there are
                rules without a model; see `label_roles` too.

        Examples:
            >>> import torch
            >>> import cruxy_torch
            >>> model = torch.nn.Linear(2, 2)
            >>> optimizer = cruxy_torch.CruxyOptimizer(model.parameters(), weight_decay=0.0)
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> with optimizer.debug_check(model) as check:
            ...     _ = optimizer.step(loss=1.0)
            >>> check.tensors[0].name, round(check.tensors[0].values["update"].rms, 5)
            ('weight', 0.00075)
            >>> model.bias.grad[0] = float("nan")
            >>> for found in optimizer.debug_check(model).nonfinite:
            ...     print(found.name, found.where, found.count)
            bias gradient 1
        """
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got {type(model).__name__}; leave it out, or "
                "give the module whose parameters are optimized."
            )
        rules = check_rules(rules)
        if rules and model is None:
            raise ValueError(
                "rules need the model whose parameters they name, got none; give both."
            )
        return DebugCheck(self, model, rules)


class _Row(NamedTuple):
    """A parameter, its name and role, and the number of its group; `None` where it is in none."""

    param: Tensor
    name: str
    role: str
    group: int | None


class _Seen(NamedTuple):
    """Two sums over a tensor.

    Attributes:
        row: the number of its parameter; `None` for what belongs to none.
        name: where there is no parameter to name it by.
        where: what of the parameter it is.
        column: whether the table has it, and not only the names below.
        sums: of the squares of its finite numbers on this rank, and how many are not finite.
        whole: has all its elements, split over the ranks as it is.
    """

    row: int | None
    name: str
    where: str
    column: bool
    sums: Tensor
    whole: Tensor


def names_of(optimizer: Any) -> dict[Tensor, str]:
    """What each parameter of an optimizer is called: its name, or its group and place."""
    return {row.param: row.name for row in _rows(optimizer, None, ())}


def _rows(optimizer: Any, model: nn.Module | None, rules: Sequence[Rule]) -> list[_Row]:
    """All parameters of the optimizer, then those that only the model has."""
    found = {} if model is None else {one.tensor: one for one in find(model, rules)}
    rows: dict[Tensor, _Row] = {}
    for index, group in enumerate(optimizer.param_groups):
        for param, name in zip(group["params"], _checks.called(group, index), strict=True):
            role = group.get("role")
            if param in found:
                name, label = found[param].names[0], found[param].label
                role = label.role if label.decided_by == "rule" else role or label.role
            rows[param] = _Row(param, name, role or f"group {index}", index)
    for param, one in found.items():
        rows.setdefault(param, _Row(param, one.names[0], one.label.role, None))
    for row in rows.values():
        if row.param.is_meta:
            raise ValueError(
                f"parameters must have values to be checked, got {row.name} on the meta device; "
                "load its values first."
            )
    return [row for row in rows.values() if row.param.is_floating_point()]


def _look_at(rows: Sequence[_Row], optimizer: Any, before: dict[Tensor, Tensor]) -> Iterator[_Seen]:
    """All that belongs to a parameter."""
    for index, (param, *_) in enumerate(rows):
        for where, own, whole in _parts(param, optimizer.state.get(param, {}), before.get(param)):
            column = whole.ndim > 0 or where in (*MEASURED, *SHAPED)
            yield _Seen(index, "", where, column, _sums(own), whole)


def _parts(
    param: Tensor, state: dict[str, Any], before: Tensor | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What there is of a parameter: its name, this rank's part, and what tells the parts."""
    own = local(param.detach())
    yield "parameter", own, param
    if param.grad is not None:
        yield "gradient", local(_checks.dense_grad(param)), param
    if before is not None:
        yield "update", own.to(torch.promote_types(own.dtype, torch.float32)) - before, param
    for name, kept in state.items():
        coded = name.removesuffix("_codes").removesuffix("_scales")
        if f"{coded}_codes" not in state:
            if isinstance(kept, Tensor) and kept.is_floating_point():
                yield name, local(kept), kept
        elif name == f"{coded}_codes":
            yield coded, value_of(param, state, coded), param


def _look_beside(optimizer: Any, model: nn.Module | None) -> Iterator[_Seen]:
    """The controller, but for what it last measured, and the model's buffers."""
    for key, value in optimizer._law().items():
        if value.is_floating_point() and key != "report":
            yield _Seen(None, "controller", key, False, _sums(value), value)
    for name, buffer in () if model is None else model.named_buffers():
        if buffer.is_floating_point() and not buffer.is_meta:
            yield _Seen(None, name, "buffer", False, _sums(local(buffer)), buffer)


def _sums(x: Tensor) -> Tensor:
    """The sum of the squares of what is finite, and the count of what is not.

    In float64, where squares of float32 do not overflow.
    """
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    total = torch.zeros(2, dtype=wide, device=x.device)
    for (block,) in blocks(x.detach()):
        block = block.to(wide)
        finite = torch.isfinite(block)
        squares = torch.where(finite, block, 0.0).square().sum()
        total += torch.stack([squares, (~finite).sum().to(wide)])
    return total


def _on_host(seen: Sequence[_Seen], optimizer: Any) -> tuple[list[Stats], list[float], list[float]]:
    """What was seen, the telemetry, and the groups' rates: the one transfer from the device."""
    law_state = optimizer._law()
    home = law_state["step"].device
    sums = torch.zeros(len(seen), 2, dtype=seen[0].sums.dtype, device=home)
    for indices in by_device([one.sums for one in seen]).values():
        sums[indices] = torch.stack([seen[i].sums for i in indices]).to(home, sums.dtype)
    add_shards(sums, [one.whole for one in seen])
    rates = [
        lr.detach().reshape(1) if isinstance(lr, Tensor) else sums.new_tensor([lr])
        for lr in (group["lr"] for group in optimizer.param_groups)
    ]
    shown = _telemetry.everything(law_state)
    parts = [sums.view(-1), shown, *rates]
    numbers = torch.cat([part.to(home, sums.dtype) for part in parts]).tolist()
    first, second = 2 * len(seen), 2 * len(seen) + len(shown)
    stats = []
    for one, square, bad in zip(seen, numbers[:first:2], numbers[1:first:2], strict=True):
        count = one.whole.numel() - int(bad)
        rms = math.sqrt(square / count) if count else 0.0
        stats.append(Stats(one.whole.numel(), rms, int(bad)))
    return stats, numbers[first:second], numbers[second:]


def _applied(lr: float, last: Mapping[Any, float], optimizer: Any) -> float:
    """The rate that the last step's orders make of a group's own; NaN before the first step."""
    if last["meta_scale"] == NOT_KNOWN:
        return math.nan
    controls = neutral(numpy.bool_(last["ok"]), xp=_scalar_numpy)
    controls = controls._replace(meta_scale=numpy.float32(last["meta_scale"]))
    bounds = optimizer._settings.lr_bounds
    rate = meta_learning_rate(controls, numpy.float32(lr), bounds, xp=_scalar_numpy)
    return float(rate * numpy.float32(last["phase_scale"]))


def _limits(
    rows: Sequence[_Row], values: Sequence[Mapping[str, Stats]], optimizer: Any
) -> list[float]:
    """The largest rate that a relative limit allows each parameter."""
    shares = [
        None if row.group is None else optimizer.param_groups[row.group].get("relative_limit")
        for row in rows
    ]
    sizes = [found["parameter"] for found in values]
    trained = [row.param.grad is not None or row.param in optimizer.state for row in rows]
    bounded = [s for s, share, t in zip(sizes, shares, trained, strict=True) if share and t]
    whole = numpy.float32(pooled(bounded).rms ** 2)
    limits = [math.inf] * len(rows)
    for index, (row, size, share) in enumerate(zip(rows, sizes, shares, strict=True)):
        if share is not None:
            group = optimizer.param_groups[row.group]
            (own,) = limit_shares([row.param], optimizer._limit_width(group)) or [1.0]
            square = numpy.float32(size.rms**2)
            limit = relative_limit(
                square, share, RELATIVE_FLOOR, xp=_scalar_numpy, whole=whole, share=own
            )
            limits[index] = float(limit)
    return limits
