"""What is kept beside each parameter: how it is made, found again, opened for a step and loaded."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cruxy_exact.codes import BlockCode
from cruxy_exact.near import NearCode
from cruxy_torch import _near
from cruxy_torch._columns import Columns
from cruxy_torch._distributed.shards import (
    any_sharded,
    is_sharded,
    local,
    placed,
    shard_elements,
)
from cruxy_torch._kept import BLOCK_SIZE, Coded, Kept, Rounded, compute_dtype, read, write

SMALLEST = 4096
"""Parameters of fewer elements keep their moments in float32."""

SHARD = "shard_elements"
"""Beside codes: elements of the largest shard, each of which has blocks of its own; int64, `()`."""

FACTORS = ("row_var", "col_var")
"""What our own optimizers keep of a parameter's shape but for an axis of one element."""

SHAPED = ("exp_avg", "exp_avg_sq", "average", "variance", *FACTORS)
"""What they keep that has the shape of its parameter, and these."""

AVERAGE_CODES, AVERAGE_SCALES = "average_codes", "average_scales"
"""Where an average in fewer bits is kept; else it is `average`."""

_CODE_KINDS = {
    (torch.int8, BLOCK_SIZE),
    (torch.uint8, BLOCK_SIZE),
    (torch.uint8, BLOCK_SIZE // 2),
    (torch.int16, BLOCK_SIZE),
}
"""Dtype and width of a block of codes: of 8 bits with and without a sign, of 4, of 16."""

_CODES = {(bits, signed): BlockCode(bits, signed) for bits in (8, 4) for signed in (True, False)}


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


def bits_of(param: Tensor, bits: int) -> int:
    """Bits an element of a parameter's moments, where so many are asked for."""
    return 32 if param.numel() < SMALLEST else bits


def warn_of_small(groups: Iterable[dict[str, Any]], stacklevel: int) -> None:
    """Says so where groups ask for codes and no parameter is large enough to have any."""
    asked = [(p, group["state_bits"]) for group in groups for p in group["params"]]
    if any(bits < 16 for _, bits in asked) and all(bits_of(*own) >= 16 for own in asked):
        warnings.warn(
            f"state_bits={min(bits for _, bits in asked)} codes nothing here: moments of fewer "
            f"than {SMALLEST:,} elements stay in float32, and no parameter has as many; leave it "
            "out.",
            stacklevel=stacklevel + 1,
        )


def is_signed(name: str) -> bool:
    """Whether a moment of this name may be negative."""
    return not name.endswith("_sq")


def has_moment(state: dict[str, Any], name: str) -> bool:
    """Whether the state has a moment of that name, in any form."""
    return name in state or f"{name}_codes" in state


def add_moment(
    state: dict[str, Any], name: str, param: Tensor, dtype: torch.dtype, bits: int
) -> None:
    """Adds a moment of zeros, as a tensor like the parameter or as codes and scales.

    Args:
        state: of the parameter.
        name: of the moment, see `is_signed`.
        param: the parameter.
        dtype: of a moment of 32 bits.
        bits: 32, 16, 8 or 4.
    """
    if bits >= 16:
        dtype = torch.bfloat16 if bits == 16 else dtype
        state[name] = torch.zeros_like(param, dtype=dtype)
        return
    kind = torch.int8 if bits == 8 and is_signed(name) else torch.uint8
    _add_codes(state, name, param, BLOCK_SIZE * bits // 8, kind)


def _add_codes(
    state: dict[str, Any], name: str, param: Tensor, width: int, kind: torch.dtype
) -> None:
    each = shard_elements(param)
    count = math.ceil(each / BLOCK_SIZE)
    device = local(param).device
    codes = torch.zeros(count, width, dtype=kind, device=device)
    state[f"{name}_codes"] = placed(codes, param)
    scales = torch.zeros(count, dtype=torch.bfloat16, device=device)
    state[f"{name}_scales"] = placed(scales, param)
    state[SHARD] = torch.full((), each, dtype=torch.int64, device=device)


def add_average(state: dict[str, Any], param: Tensor, bits: int) -> None:
    """Adds the average of a parameter, which is the parameter itself, in 32, 16 or 8 bits."""
    if bits == 32:
        state["average"] = param.detach().to(compute_dtype(param), copy=True)
        return
    _add_codes(state, "average", param, BLOCK_SIZE, torch.int8 if bits == 8 else torch.int16)
    _near.begin(local(param.detach()), _near_average(local(param), state, 0))


def average(param: Tensor, value: Tensor, bits: int) -> dict[str, Tensor]:
    """The state of an average that has this value, in `bits` to the nearest."""
    if bits == 32:
        return {"average": value}
    state: dict[str, Tensor] = {}
    add_average(state, param, bits)
    _near.put(local(param.detach()), _near_average(local(param), state, 0), value)
    return state


def kept_average(param: Tensor, state: Mapping[str, Any], number: int) -> Tensor | Coded:
    """This rank's part of the average of a parameter.

    Args:
        param: the parameter.
        state: of it, with an average.
        number: of its first element.
    """
    if "average" in state:
        return local(state["average"])
    return _near_average(local(param), state, number)


def has_average(state: Mapping[str, Any]) -> bool:
    """Whether the state has an average, in any form."""
    return "average" in state or AVERAGE_CODES in state


def average_of(param: Tensor, state: Mapping[str, Any]) -> Tensor:
    """The value of this rank's part of an average, as a tensor like the parameter."""
    return _near.numbers_of(local(param.detach()), kept_average(param, state, 0))


def _near_average(param: Tensor, state: Mapping[str, Any], number: int) -> Coded:
    codes, scales = _own_codes(state, "average", param)
    return Coded(codes, scales, NearCode(8 * codes.element_size()), param.shape, number)


def moment(
    param: Tensor, value: Tensor, name: str, dtype: torch.dtype, bits: int
) -> dict[str, Tensor]:
    """The state of one moment that has this value, in `bits` to the nearest; see `add_moment`."""
    state: dict[str, Tensor] = {}
    add_moment(state, name, param, dtype, bits)
    ok = torch.ones((), dtype=torch.bool, device=value.device)
    write([_kept(state, name, local(param), 0, halved=False)], [value], None, ok)
    return state


def value_of(param: Tensor, state: dict[str, Any], name: str) -> Tensor:
    """The value of a moment, as a tensor like the parameter."""
    kept = _kept(state, name, local(param), 0, halved=False)
    return kept if isinstance(kept, Tensor) else read([kept], [torch.float32])[0]


def as_stepped(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    numbers: list[int],
    names: Sequence[str],
    *,
    halved: bool,
    stochastic: bool,
) -> Columns:
    """Parameters, gradients and state as a step takes them, each rank's own shard of a `DTensor`.

    Args:
        params: the parameters.
        grads: their gradients.
        states: what is kept of each.
        numbers: of each parameter's first element, see `numbered`.
        names: of the moments.
        halved: whether bfloat16 moments are rounded by chance.
        stochastic: whether bfloat16 parameters are.
    """
    check_shapes(params, states, names)
    sharded = any_sharded(grads)
    own = [local(p) for p in params] if sharded else params
    moments: dict[str, Sequence[Any]] = {}
    for name in names:
        column: list[Kept | None] = [state.get(name) for state in states]
        if halved or sharded or any(kept is None for kept in column):
            rows = zip(states, own, numbers, strict=True)
            column = [_kept_or_none(*row, name, halved=halved) for row in rows]
        moments[name] = column
    stepped: list[Kept] = list(own)
    if stochastic:
        rows = zip(own, params, numbers, strict=True)
        stepped = [_rounded(p, number + _padded(whole)) for p, whole, number in rows]
    averages = [local(state["average"]) for state in states if "average" in state]
    local_grads = [local(grad) for grad in grads] if sharded else grads
    return Columns(stepped, local_grads, grads, states, moments, averages)


def check_shapes(
    params: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    names: Sequence[str],
    *,
    called: Sequence[str] = (),
    remedy: str = "resize the state with its parameter, or drop it: del optimizer.state[parameter]",
) -> None:
    """Raises unless what is kept of each parameter has its parameter's shape.

    Args:
        params: the parameters.
        states: what is kept of each.
        names: of what is shaped like its parameter, where there is one of that name.
        called: what each parameter is called; none where nobody knows.
        remedy: what to do, a sentence without its full stop.

    Raises:
        ValueError: where something has another shape.
    """
    for name in names:
        for param, state in zip(params, states, strict=True):
            if name in state and state[name].shape == param.shape:
                continue
            for key, shape in _shapes(param, state, name):
                if state[key].shape != shape:
                    place = next(i for i, one in enumerate(params) if one is param)
                    who = called[place] if called else f"a parameter of shape {tuple(param.shape)}"
                    raise ValueError(
                        f"{key} must have shape {tuple(shape)} beside {who}, got "
                        f"{tuple(state[key].shape)}; {remedy}."
                    )


def _shapes(param: Tensor, state: dict[str, Any], name: str) -> list[tuple[str, Sequence[int]]]:
    """The keys of a moment in a parameter's state, and the shapes they have to have."""
    if name in state:
        whole = param.shape
        if name in FACTORS and state[name].ndim == param.ndim:
            kept = state[name].shape
            whole = torch.Size(1 if k == 1 else n for k, n in zip(kept, whole, strict=True))
        return [(name, whole)]
    if f"{name}_codes" not in state or is_sharded(param):  # `check_shards` looks at those
        return []
    blocks = math.ceil(param.numel() / BLOCK_SIZE)
    width = state[f"{name}_codes"].shape[1:]
    return [(f"{name}_codes", torch.Size([blocks, *width])), (f"{name}_scales", (blocks,))]


def _kept_or_none(
    state: dict[str, Any], param: Tensor, number: int, name: str, *, halved: bool
) -> Kept | None:
    return _kept(state, name, param, number, halved=halved) if has_moment(state, name) else None


def _kept(state: dict[str, Any], name: str, param: Tensor, number: int, *, halved: bool) -> Kept:
    """This rank's moment as a step takes it, of this rank's parameter."""
    if name in state:
        whole = local(state[name])
        return _rounded(whole, number) if halved else whole
    codes, scales = _own_codes(state, name, param)
    bits = 8 * codes.shape[1] // BLOCK_SIZE
    return Coded(codes, scales, _CODES[bits, is_signed(name)], param.shape, number)


def _own_codes(state: Mapping[str, Any], name: str, param: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's codes and scales, of this rank's parameter."""
    codes, scales = local(state[f"{name}_codes"]), local(state[f"{name}_scales"])
    count = math.ceil(param.numel() / BLOCK_SIZE)
    if len(scales) != count:  # another rank's shard is larger
        codes, scales = codes[:count], scales[:count]
    return codes, scales


def _rounded(tensor: Tensor, number: int) -> Kept:
    return Rounded(tensor, number) if tensor.dtype == torch.bfloat16 else tensor


def _padded(param: Tensor) -> int:
    return math.ceil(param.numel() / BLOCK_SIZE) * BLOCK_SIZE


def restored(
    param: Tensor, old: dict[str, Any], saved: dict[str, Any], dtype: torch.dtype | None
) -> dict[str, Any]:
    """The state of a parameter as it was saved, in the tensors that are there already.

    Args:
        param: the parameter.
        old: its state before loading.
        saved: what was saved of it.
        dtype: of a first moment that is not coded; `None` for that which was saved.
    """
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


def check_shards(param: Tensor, saved: dict[str, Any]) -> None:
    """Raises unless codes are some, whose blocks begin and end where the parameter's shards do."""
    if SHARD not in saved:
        return
    for name, codes in saved.items():
        kind = (codes.dtype, codes.shape[-1]) if name.endswith("_codes") else None
        if kind is not None and kind not in _CODE_KINDS:
            raise ValueError(
                f"{name} must hold codes of 16, 8 or 4 bits, {BLOCK_SIZE} elements a block, got "
                f"{kind[0]} in rows of {kind[1]}; load what state_dict() gave."
            )
    there, here = int(saved[SHARD]), shard_elements(param)
    if there != here and (there % BLOCK_SIZE or here % BLOCK_SIZE):
        raise ValueError(
            f"codes must fit the shards of their parameter, got some of shards of {there} elements "
            f"for shards of {here}; load them on as many processes as saved them, or save with "
            "state_bits=32 and average_bits=32."
        )
