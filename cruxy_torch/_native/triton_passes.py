"""The passes in Triton over tensors on CUDA devices, and how they are handed over."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cruxy_torch._columns import Columns
from cruxy_torch._kept import raw
from cruxy_torch._native import fit, triton_found, triton_launch, triton_steps
from cruxy_torch._native.triton_kernels import ROWS
from cruxy_torch._native.triton_launch import NOTHING, OPTIONS, UPDATE_OPTIONS, Form
from cruxy_torch._native.triton_matrices import matrix
from cruxy_torch._native.triton_rules import misfit, parts
from cruxy_torch._native.triton_sums import Together, mean_squares, sums, sums_by_tensor
from cruxy_torch._native.triton_tables import constant, table
from cruxy_torch._native.triton_tensors import key_of, momentum, move
from cruxy_torch._native.triton_whole import adam, sign
from cruxy_torch._orders import Orders

__all__ = [
    "NAME", "OPTIONS", "UPDATE_OPTIONS", "Form", "adam", "decide", "matrix", "mean_squares",
    "misfit", "momentum", "move", "one", "parts", "sign", "sums", "sums_by_tensor", "together",
    "update",
]  # fmt: skip

NAME = "triton"


def one(device: torch.device) -> Tensor:
    """The number 1, float32, on a device."""
    return constant(1.0, device)


together = Together


def decide(settings: Any, law_state: Any, groups: Any, measured: Any) -> list[Orders] | None:
    """See `triton_law.decide`; nothing where it fails."""
    if not triton_found.available(law_state["step"].device):
        return None
    from cruxy_torch._native import triton_law  # which starts kernels by this module

    try:
        return triton_law.decide(settings, law_state, groups, measured)
    except fit.SetAsideError:
        return None


def _moments(columns: dict[str, Sequence[int]], name: str, kept: Sequence[Any]) -> Form:
    """Fills in where moments lie; returns their form."""
    columns[name] = fit.addresses(list(map(raw, kept)))
    columns[f"{name}_scales"] = fit.scales(kept)
    return Form.of(kept[0])


def update(
    columns: Columns,
    orders: Orders,
    moments: Sequence[str],
    clocks: Sequence[str] = (),
    *,
    decay: Any,
    l2: Any = 0.0,
    eps: float = 0.0,
    nesterov: bool = False,
    centralize: bool = False,
) -> None:
    """One step of Adam, or of Lion with one moment, with the averages; of one of the `parts`.

    Args:
        columns: the tensors.
        orders: as tensors on any device, or as numbers.
        moments: names of the first moment and, for Adam, the second.
        clocks: names of the products of both decay rates so far; empty for Lion.
        decay: coefficient of the decay that is added to the update; the factor that the law has on
            it is taken from the orders.
        l2: of that which is added to the gradient.
        eps: added to the root of the second moment.
        nesterov: looks one step ahead.
        centralize: is not taken for gradients of two or more axes.
    """
    params, grads = [raw(p) for p in columns.params], columns.grads
    device = params[0].device
    orders = orders.to(device)
    rows: dict[str, Sequence[int]] = {
        "param": fit.addresses(params),
        "grad": fit.addresses(grads),
        "numel": list(map(Tensor.numel, grads)),
        "number": fit.first_numbers(columns.params),
    }
    first = columns.moments[moments[0]]
    of_param, of_first = Form.of(columns.params[0]), _moments(rows, "first", first)
    rows["first_number"] = fit.first_numbers(first)
    of_second = NOTHING
    if len(moments) > 1:
        of_second = _moments(rows, "second", columns.moments[moments[1]])
        for row, name in zip(("product1", "product2"), clocks, strict=True):
            products = [state[name] for state in columns.states]
            rows[row] = fit.numbers(products, device.type)
    if columns.averages:
        rows["average"] = fit.addresses(columns.averages)
    limits = rate = _whole(orders.rate)
    if columns.limits:
        limits, rows["limit"] = _in_one(columns.limits, device)
    of = table(rows, device)
    chance = of_param.chance or of_first.chance or of_second.chance
    steered = orders.decay_scale is not None
    pull = orders.average_pull if columns.averages else None
    triton_launch.launch(
        device, triton_steps.update_of_chunks, (of.count,),
        of.values, of.tensors, of.chunks, of.tiles, of.starts, of.counters,
        rate, *map(_whole, (orders.beta1, orders.beta2, orders.scale)), orders.ok.view(torch.uint8),
        key_of(orders, device) if chance else of.counters,
        _whole(orders.average_weight) if columns.averages else rate,
        rate if pull is None else _whole(pull),
        _whole(orders.decay_scale) if steered else rate, limits,
        float(l2 or decay), eps,
        P=of_param.format, P_CHANCE=of_param.chance, G=Form.of(grads[0]).format,
        M=of_first.format, M_CHANCE=of_first.chance, M_SHIFT=of_first.shift,
        M_TOP=of_first.top, M_LEAST=of_first.least,
        V=of_second.format, V_CHANCE=of_second.chance, V_SHIFT=of_second.shift,
        V_TOP=of_second.top, V_LEAST=of_second.least,
        NESTEROV=nesterov, COUPLED=bool(l2), AVERAGED=bool(columns.averages),
        PULLED=pull is not None, LIMITED=bool(columns.limits), STEERED=steered,
        ALIGNED=of.aligned, ROWS=ROWS, **UPDATE_OPTIONS,
    )  # fmt: skip
    torch.autograd.graph.increment_version(params)  # as torch's own in-place operations do


def _in_one(limits: Sequence[Tensor], device: torch.device) -> tuple[Tensor, list[int]]:
    """Numbers as one vector and the place of each in it; views of one vector are not copied."""
    storages = {limit.untyped_storage().data_ptr() for limit in limits}
    if len(storages) > 1 or limits[0].device != device or limits[0].dtype != torch.float32:
        return torch.stack([t.to(device, torch.float32) for t in limits]), list(range(len(limits)))
    places = [int(limit.storage_offset()) for limit in limits]
    return limits[0].as_strided((max(places) + 1,), (1,), 0), places


def _whole(number: Tensor) -> Tensor:
    return number.to(torch.float32)
