"""What `CruxyOptimizer` keeps beside each parameter: how it is made, found again and loaded."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cruxy_exact.codes import BlockCode
from cruxy_torch._actuators.apply import Tensors
from cruxy_torch._kept import BLOCK_SIZE, Coded, Kept, Rounded, read, write
from cruxy_torch._sensors import measure as _sensors

SMALLEST = 4096
"""Parameters of fewer elements keep their moments in float32."""

SHARD = "shard_elements"
"""Beside codes: elements of the largest shard, each of which has blocks of its own; int64, `()`."""

_CODES = {(bits, signed): BlockCode(bits, signed) for bits in (8, 4) for signed in (True, False)}


class Columns(NamedTuple):
    """The parameters of a group that have a gradient with their state, one list per kind.

    Attributes:
        params: the parameters.
        grads: their gradients.
        firsts: first moments, or the codes of them.
        first_scales: the scales of the codes; `None` where there are none.
        seconds: second moments, or the codes of them; empty for Lion.
        second_scales: as `first_scales`.
        clocks1: see `_kernels.Tensors`.
        clocks2: see there.
        numbers: the number of each parameter's first element, see `numbered`.
        averages: the average of each parameter; empty where none is kept.
    """

    params: list[Tensor]
    grads: list[Tensor]
    firsts: list[Tensor]
    first_scales: list[Tensor | None]
    seconds: list[Tensor]
    second_scales: list[Tensor | None]
    clocks1: list[Tensor]
    clocks2: list[Tensor]
    numbers: list[int]
    averages: list[Tensor]


def empty_columns() -> Columns:
    """Columns to be filled."""
    return Columns([], [], [], [], [], [], [], [], [], [])


def numbered(params: Iterable[Tensor]) -> dict[Tensor, int]:
    """The number of each parameter's first element, from which its random bits follow.

    An element's two moments share a number, and so the same random bits; the parameter itself has
    another. Each tensor has whole blocks of numbers.
    """
    numbers, free = {}, 0
    for param in params:
        numbers[param] = free
        free += 2 * _padded(param)
    return numbers


def add_moment(
    state: dict[str, Any], name: str, param: Tensor, dtype: torch.dtype, bits: int
) -> None:
    """Adds a moment of zeros, as a tensor like the parameter or as codes and scales.

    Args:
        state: of the parameter.
        name: `"exp_avg"` or `"exp_avg_sq"`, of which the second is never negative.
        param: the parameter.
        dtype: of a moment of 32 bits.
        bits: 32, 16, 8 or 4.
    """
    if bits >= 16:
        dtype = torch.bfloat16 if bits == 16 else dtype
        state[name] = torch.zeros_like(param, dtype=dtype)
        return
    each = shard_elements(param)
    count = math.ceil(each / BLOCK_SIZE)
    kind = torch.int8 if bits == 8 and name == "exp_avg" else torch.uint8
    device = _sensors.local(param).device
    codes = torch.zeros(count, BLOCK_SIZE * bits // 8, dtype=kind, device=device)
    state[f"{name}_codes"] = _placed(codes, param)
    scales = torch.zeros(count, dtype=torch.bfloat16, device=device)
    state[f"{name}_scales"] = _placed(scales, param)
    state[SHARD] = torch.full((), each, device=device)


def moment(
    param: Tensor, value: Tensor, name: str, dtype: torch.dtype, bits: int
) -> dict[str, Tensor]:
    """The state of one moment that has this value, in `bits` to the nearest; see `add_moment`."""
    state: dict[str, Tensor] = {}
    add_moment(state, name, param, dtype, bits)
    write([_of_state(state, param, name)], [value], None, torch.ones((), dtype=torch.bool))
    return state


def value_of(param: Tensor, state: dict[str, Any], name: str) -> Tensor:
    """The value of a moment, as a tensor like the parameter."""
    kept = _of_state(state, param, name)
    return kept if isinstance(kept, Tensor) else read([kept], [torch.float32])[0]


def _of_state(state: dict[str, Any], param: Tensor, name: str) -> Kept:
    moments: list[Tensor] = []
    scales: list[Tensor | None] = []
    append(moments, scales, state, name)
    return _kept(moments[0], scales[0], param, 0, name == "exp_avg", False)


def has_moment(state: dict[str, Any], name: str) -> bool:
    """Whether the state has a moment of that name, in any form."""
    return name in state or f"{name}_codes" in state


def append(
    moments: list[Tensor], scales: list[Tensor | None], state: dict[str, Any], name: str
) -> None:
    """Adds a moment to two of the columns."""
    whole = state.get(name)
    moments.append(state[f"{name}_codes"] if whole is None else whole)
    scales.append(state[f"{name}_scales"] if whole is None else None)


def kept(columns: Columns, *, halved: bool, stochastic: bool) -> Tensors:
    """Parameters, gradients and state as a step takes them, each rank's own shard of a `DTensor`.

    Args:
        columns: see there.
        halved: whether bfloat16 moments are rounded by chance.
        stochastic: whether bfloat16 parameters are.
    """
    coded = any(scales is not None for scales in columns.first_scales)
    if not (coded or halved or stochastic or _sensors.any_sharded(columns.grads)):
        c = columns
        whole = Tensors(c.params, c.grads, c.firsts, c.seconds, c.clocks1, c.clocks2)  # pyright: ignore[reportArgumentType]
        return whole._replace(averages=c.averages)
    params: list[Kept] = []
    firsts: list[Kept] = []
    seconds: list[Kept] = []
    for i, number in enumerate(columns.numbers):
        param, padded = _sensors.local(columns.params[i]), _padded(columns.params[i])
        first = _kept(columns.firsts[i], columns.first_scales[i], param, number, True, halved)
        firsts.append(first)
        if columns.seconds:
            moment, scales = columns.seconds[i], columns.second_scales[i]
            seconds.append(_kept(moment, scales, param, number, False, halved))
        params.append(_rounded(param, number + padded) if stochastic else param)
    grads = [_sensors.local(grad) for grad in columns.grads]
    clocks = columns.clocks1, columns.clocks2
    averages = [_sensors.local(average) for average in columns.averages]
    return Tensors(params, grads, firsts, seconds, *clocks, averages=averages)


def kept_param(param: Tensor, number: int, *, stochastic: bool) -> Kept:
    """This rank's parameter as a step takes it."""
    whole = _sensors.local(param)
    return _rounded(whole, number + _padded(param)) if stochastic else whole


def kept_moment(state: dict[str, Any], name: str, param: Tensor, number: int) -> Kept:
    """This rank's moment as a step takes it; one in bfloat16 is rounded by chance."""
    values = state[name] if name in state else state[f"{name}_codes"]
    scales = state.get(f"{name}_scales")
    return _kept(values, scales, _sensors.local(param), number, name == "exp_avg", True)


def _kept(
    moment: Tensor, scales: Tensor | None, param: Tensor, number: int, signed: bool, halved: bool
) -> Kept:
    moment = _sensors.local(moment)
    if scales is None:
        return _rounded(moment, number) if halved else moment
    bits = 8 * moment.shape[1] // BLOCK_SIZE
    count = math.ceil(param.numel() / BLOCK_SIZE)
    scales = _sensors.local(scales)
    if len(scales) != count:  # another rank's shard is larger
        moment, scales = moment[:count], scales[:count]
    return Coded(moment, scales, _CODES[bits, signed], param.shape, number)


def _rounded(tensor: Tensor, number: int) -> Kept:
    return Rounded(tensor, number) if tensor.dtype == torch.bfloat16 else tensor


def restored(
    param: Tensor, old: dict[str, Any], saved: dict[str, Any], dtype: torch.dtype | None
) -> dict[str, Any]:
    """The state of a parameter as it was saved, in the tensors that are there already.

    Args:
        param: the parameter.
        old: its state before loading.
        saved: what was saved of it.
        dtype: of a first moment that is not coded; `None` for that which was saved.

    Raises:
        ValueError: where codes were saved under another sharding.
    """
    _check_shards(param, saved)
    state: dict[str, Any] = {}
    for key, value in saved.items():
        if not isinstance(value, Tensor):
            state[key] = value
            continue
        wanted = dtype if key == "exp_avg" and dtype is not None else value.dtype
        target = old.get(key)
        if target is None or (target.shape, target.dtype) != (value.shape, wanted):
            target = torch.empty_like(value, dtype=wanted, device=param.device)
        with torch.no_grad():
            state[key] = target.copy_(value)
    return state


def _check_shards(param: Tensor, saved: dict[str, Any]) -> None:
    """Raises unless blocks of codes begin and end where the parameter's shards do."""
    if SHARD not in saved:
        return
    there, here = int(saved[SHARD]), shard_elements(param)
    if there != here and (there % BLOCK_SIZE or here % BLOCK_SIZE):
        raise ValueError(
            f"codes must fit the shards of their parameter, got some of shards of {there} elements "
            f"for shards of {here}; load them on as many processes as saved them, or save with "
            "state_bits=32."
        )


def _padded(param: Tensor) -> int:
    return math.ceil(param.numel() / BLOCK_SIZE) * BLOCK_SIZE


def shard_elements(param: Tensor) -> int:
    """Elements of the largest shard."""
    shape = list(param.shape)
    if _sensors.is_sharded(param):
        for axis, placement in enumerate(param.placements):
            if not placement.is_replicate():
                dim: int = placement.dim  # pyright: ignore[reportAttributeAccessIssue]
                shape[dim] = math.ceil(shape[dim] / param.device_mesh.size(axis))
    return math.prod(shape)


def _placed(local: Tensor, param: Tensor) -> Tensor:
    """One tensor over the parameter's mesh of which each rank holds its own blocks."""
    if not _sensors.is_sharded(param):
        return local
    from torch.distributed.tensor import DTensor, Shard

    placements = [p if p.is_replicate() else Shard(0) for p in param.placements]
    return DTensor.from_local(local, param.device_mesh, placements, run_check=False)
