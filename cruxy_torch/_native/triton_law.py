"""What is computed on scalars in a step, from sums to orders, as one launch."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cruxy_control.controls import DRIVEN
from cruxy_torch import _decide, _law_state
from cruxy_torch._groups import Settings
from cruxy_torch._native import triton_launch, triton_tables, triton_written
from cruxy_torch._native.triton_launch import OPTIONS
from cruxy_torch._native.triton_tape import FLOAT, INT, Tape
from cruxy_torch._native.triton_written import NotRecordedError
from cruxy_torch._orders import Orders

NUMBERS = (
    "rate", "beta1", "beta2", "scale", "average_weight", "sign_weight", "decay_scale",
    "average_pull",
)  # fmt: skip
"""What a group is ordered in float32, in the order in which it is kept."""

_OF_GROUP = ("lr", "b1", "b2")
_KINDS = {torch.float32: FLOAT, torch.int32: INT}
_KEPT = 64
_kernels: collections.OrderedDict[Any, "Recorded | None"] = collections.OrderedDict()


class Recorded(NamedTuple):
    """A kernel, and how it is called.

    Attributes:
        kernel: as Triton has it.
        source: of it.
        types: of its arguments, by their names in order.
        unsaid: of each group, what of `NUMBERS` it is not ordered.
        keyed: whether there are random bits.
    """

    kernel: Any
    source: str
    types: dict[str, str]
    unsaid: tuple[frozenset[str], ...]
    keyed: bool


def decide(
    settings: Settings,
    law_state: dict[str, Tensor],
    groups: Sequence[Any],
    measured: _decide.Measured,
) -> list[Orders] | None:
    """What `_decide.decide` orders each group; what changes in the law's state is kept.

    Args:
        settings: of the optimizer.
        law_state: see `_law_state`.
        groups: see `_decide.decide`.
        measured: likewise.

    Returns:
        `None` where the law cannot be written as a kernel, or something lies elsewhere.

    Raises:
        SetAsideError: where the kernel fails; nothing has changed then.
    """
    device = law_state["step"].device
    arguments = _arguments(law_state, groups, measured, device)
    if arguments is None or not _is_fixed(settings.law):
        return None
    key = _key(settings, law_state, groups, measured)
    if key not in _kernels:
        _kernels[key] = _recorded(settings, law_state, groups, measured)
        if len(_kernels) > _KEPT:
            _kernels.popitem(last=False)
    found = _kernels[key]
    if found is None:
        return None
    out = torch.empty((len(groups), len(NUMBERS)), dtype=torch.float32, device=device)
    ok = torch.empty((), dtype=torch.bool, device=device)
    random = torch.empty((), dtype=torch.int32, device=device)
    arguments |= {"out": out, "ok": ok.view(torch.uint8), "key": random}
    limits: dict[int, Tensor] = {}
    for index, size in _sizes(groups, measured):
        limits[index] = torch.empty_like(size.mean_squares)
        arguments[f"limits{index}"] = limits[index]
    triton_launch.launch(
        device, found.kernel, (1,), *(arguments[name] for name in found.types), **OPTIONS
    )
    return [
        Orders(
            **{
                name: None if name in found.unsaid[index] else number
                for name, number in zip(NUMBERS, numbers, strict=True)
            },
            ok=ok,
            key=random if found.keyed else 0,
            limits=limits.get(index),
        )
        for index, numbers in enumerate(row.unbind() for row in out.unbind())
    ]


def _sizes(groups: Sequence[Any], measured: _decide.Measured) -> list[tuple[int, Any]]:
    """What was measured of each group under a limit, with its number."""
    stepped = [index for index, group in enumerate(groups) if group.grads]
    pairs = zip(stepped, measured.sizes, strict=True)
    return [(index, size) for index, size in pairs if size is not None]


def _arguments(
    law_state: dict[str, Tensor],
    groups: Sequence[Any],
    measured: _decide.Measured,
    device: torch.device,
) -> dict[str, Any] | None:
    """What the kernel is given, by name; `None` where something is not where it must be."""
    tensors = {f"state{i}": value for i, value in enumerate(law_state.values())}
    tensors |= {"sums": measured.total, "loss": measured.loss, "scale": measured.scale}
    numbers: dict[str, Any] = {}
    for index, group in enumerate(groups):
        for name in _OF_GROUP:
            value = getattr(group, name)
            if isinstance(value, Tensor):
                tensors[f"{name}{index}"] = value
            else:
                numbers[f"{name}{index}"] = float(value)
    for index, size in _sizes(groups, measured):
        tensors[f"squares{index}"] = size.mean_squares
        numbers[f"length{index}"] = len(size.mean_squares)
        if groups[index].limit_shares is not None:
            tensors[f"shares{index}"] = triton_tables.vector(groups[index].limit_shares, device)
    if measured.whole is not None:
        tensors["whole"], numbers["parts"] = measured.whole, float(measured.parts)
    for tensor in tensors.values():
        fits = type(tensor) is Tensor and tensor.device == device and tensor.is_contiguous()
        if not fits or tensor.dtype not in _KINDS:
            return None
    return tensors | numbers


def _is_fixed(law: Any) -> bool:
    """Whether a law's numbers cannot change, and it can be told from others."""
    fixed = getattr(law, "__dataclass_params__", None)
    if fixed is None or not fixed.frozen or not dataclasses.is_dataclass(law):
        return False
    try:
        hash(law)
    except TypeError:
        return False
    return True


def _key(
    settings: Settings,
    law_state: dict[str, Tensor],
    groups: Sequence[Any],
    measured: _decide.Measured,
) -> tuple[Any, ...]:
    """What a kernel depends on."""
    sizes = dict(_sizes(groups, measured))
    return (
        settings.law, settings.lr_bounds, settings.max_grad_norm, len(measured.total),
        measured.idle,
        tuple((name, value.dtype, tuple(value.shape)) for name, value in law_state.items()),
        tuple(
            (
                group.maximize, group.averaging, group.interpolation, group.relative_limit,
                group.rounds, bool(group.grads), group.limit_shares is None,
                *(isinstance(getattr(group, n), Tensor) for n in _OF_GROUP),
                triton_written.lanes(len(sizes[i].mean_squares)) if i in sizes else 0,
            )
            for i, group in enumerate(groups)
        ),
    )  # fmt: skip


def _recorded(
    settings: Settings,
    law_state: dict[str, Tensor],
    groups: Sequence[Any],
    measured: _decide.Measured,
) -> Recorded | None:
    """The kernel of a step's scalars; `None` where it cannot be written."""
    tape = Tape()
    try:
        values, stand, seen = _read(tape, law_state, groups, measured)
        decided = _decide.decide(settings, values, stand, seen, xp=tape, vectors=tape)
        _keep(tape, law_state, decided)
    except (NotRecordedError, AttributeError, TypeError):  # a law that calls what is not there
        return None
    source = tape.source("decide")
    plain = [name for name in tape.types if name.startswith("length")]
    return Recorded(
        kernel=triton_written.compiled(source, "decide", plain),
        source=source,
        types=tape.types,
        unsaid=tuple(
            frozenset(name for name in NUMBERS if getattr(orders, name) is None)
            for orders in decided.orders
        ),
        keyed="key" in tape.types,
    )


def _read(
    tape: Tape,
    law_state: dict[str, Tensor],
    groups: Sequence[Any],
    measured: _decide.Measured,
) -> tuple[dict[str, Any], list[Any], _decide.Measured]:
    """What stands on a tape for the state, the groups and what was measured."""
    values: dict[str, Any] = {}
    for i, (name, value) in enumerate(law_state.items()):
        if value.ndim:
            lanes = triton_written.lanes(len(value))
            values[name] = tape.vector(f"state{i}", lanes, len(value))
        else:
            values[name] = tape.scalar(f"state{i}", _KINDS[value.dtype])
    of_groups = dict(_sizes(groups, measured))
    stand = []
    for i, group in enumerate(groups):
        own = {
            name: tape.scalar(f"{name}{i}", FLOAT)
            if isinstance(getattr(group, name), Tensor)
            else tape.number(f"{name}{i}")
            for name in _OF_GROUP
        }
        if i in of_groups and group.limit_shares is not None:
            lanes = triton_written.lanes(len(group.limit_shares))
            own["limit_shares"] = tape.vector(f"shares{i}", lanes, f"length{i}")
        stand.append(dataclasses.replace(group, **own))
    sizes: list[Any] = []
    for i in (i for i, group in enumerate(groups) if group.grads):
        size = of_groups.get(i)
        if size is not None:
            lanes = triton_written.lanes(len(size.mean_squares))
            size = size._replace(mean_squares=tape.vector(f"squares{i}", lanes, f"length{i}"))
        sizes.append(size)
    seen = _decide.Measured(
        total=[tape.scalar("sums", FLOAT, at=i) for i in range(len(measured.total))],
        loss=tape.scalar("loss", FLOAT),
        scale=tape.scalar("scale", FLOAT),
        sizes=sizes,
        idle=measured.idle,
    )
    if measured.whole is not None:
        seen = seen._replace(whole=tape.scalar("whole", FLOAT), parts=tape.number("parts"))
    return values, stand, seen


def _keep(tape: Tape, law_state: dict[str, Tensor], decided: _decide.Decided) -> None:
    """Writes what a step changes and orders."""
    place = {name: f"state{i}" for i, name in enumerate(law_state)}
    for name, value in decided.state.items():
        tape.keep(place[name], value, _KINDS[law_state[name].dtype])
    ok, kept = decided.controls.ok, len(law_state["controls"])
    for at, value in enumerate(_law_state.to_hold(decided.controls, kept, xp=tape)):
        old = tape.scalar(place["controls"], FLOAT, at)
        tape.keep(place["controls"], tape.where(ok, value, old), FLOAT, at)
    for key, names in (("report", _law_state.REPORT), ("driven", DRIVEN)):
        for at, name in enumerate(names if key in law_state else ()):
            old = tape.scalar(place[key], FLOAT, at)
            new = tape.as_kind(decided.report[name], FLOAT)
            tape.keep(place[key], tape.where(decided.still, old, new), FLOAT, at)
    for index, orders in enumerate(decided.orders):
        for at, name in enumerate(NUMBERS):
            value = getattr(orders, name)
            if value is not None:
                tape.keep("out", value, FLOAT, len(NUMBERS) * index + at)
        if orders.limits is not None:
            tape.keep(f"limits{index}", orders.limits, FLOAT)
    tape.keep("ok", ok, "tl.uint8")
    if not isinstance(decided.orders[0].key, int):
        tape.keep("key", decided.orders[0].key, INT)
