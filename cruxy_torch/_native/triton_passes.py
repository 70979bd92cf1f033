"""The passes in Triton over tensors on CUDA devices, and how they are handed over."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from cruxy_exact.codes import TINY
from cruxy_torch._columns import Columns
from cruxy_torch._kept import Coded, Kept, Rounded, raw
from cruxy_torch._native import fit, triton_found, triton_steps
from cruxy_torch._native.triton_kernels import ROWS
from cruxy_torch._native.triton_tables import Table, table
from cruxy_torch._orders import Orders

NAME = "triton"

WARPS = 4
"""Groups of 32 threads to a program."""

_PLAIN = frozenset({torch.float32, torch.bfloat16})
_FORMATS = {torch.float32: 0, torch.bfloat16: 1}
_POWERS = {1.5: 0, 2.0: 1}

OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}
"""What the kernels over chunks are compiled with."""

UPDATE_OPTIONS = OPTIONS | {"maxnreg": 128}
"""Left to itself the assembler spills a few numbers to have more programs at a time."""


def parts(
    whole: Sequence[Sequence[Kept]],
    moments: Sequence[Sequence[Any]] = (),
    *,
    centralize: bool = False,
) -> tuple[list[list[int]], list[int]]:
    """See `fit.parts`; none at all where Triton has been set aside."""
    devices = {row[0].device for row in zip(*whole[:1], strict=True)}
    if all(map(triton_found.available, devices)):
        return fit.parts(_rules(), whole, moments, centralize=centralize)
    return [], list(range(len(whole[0])))


def misfit(whole: Sequence[Kept], moments: Sequence[Any], *, centralize: bool = False) -> str:
    """See `fit.misfit`."""
    found = triton_found.found(whole[0].device)
    return found.why or fit.misfit(_rules(), whole, moments, centralize=centralize)


def _rules() -> fit.Rules:
    device = "cpu" if triton_found.interpreted() else "cuda"
    return fit.Rules(device, _PLAIN, rounded=True, centralized=False)


class Form(NamedTuple):
    """How a column is kept, as the kernels take it.

    Attributes:
        format: float32 (0), bfloat16 (1), a byte (2), half a byte (3), or nothing (-1).
        chance: whether it is rounded by chance.
        shift: see `BlockCode`, as the next two.
        top: likewise.
        least: the smallest scale that is not 0.
    """

    format: int
    chance: bool = False
    shift: int = 1
    top: float = 1.0
    least: float = 1.0

    @classmethod
    def of(cls, kept: Kept) -> "Form":
        """That of a tensor."""
        if isinstance(kept, Coded):
            code = kept.code
            least = float(code.scale(numpy.float32(TINY), xp=numpy))
            return cls(2 if code.bits == 8 else 3, True, code.half.bit_length(), code.top, least)
        return cls(_FORMATS[raw(kept).dtype], isinstance(kept, Rounded))


_NOTHING = Form(-1)


def sums(
    grads: list[Tensor],
    gamma: float,
    scale: Tensor,
    momenta: Sequence[tuple[Kept, float]] | None = None,
) -> Tensor:
    """What `_sensors.measure.sums` says, of tensors of one of the `parts`, in one pass."""
    of, partial = _sums_of_chunks(grads, gamma, scale, momenta)
    count, device = 2 if momenta is None else 4, grads[0].device
    out = torch.empty(count, dtype=torch.float32, device=device)
    _launch(
        device, triton_steps.sums_of_all, (count,),
        partial, of.count, of.chunks, of.values, of.tensors, out, WIDTH=1024,
    )  # fmt: skip
    return out.to(scale.device, non_blocking=True)


def sums_by_tensor(
    grads: Sequence[Tensor],
    gamma: float,
    scale: Tensor,
    momenta: Sequence[tuple[Kept, float]] | None = None,
    params: Sequence[Tensor] | None = None,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """Of each tensor `sum g^2`, `sum |g|^gamma`, `sum g m`, `sum m^2` and `sum p^2`, in one pass.

    Args:
        grads: tensors of one of the `parts`; empty for none.
        gamma: the exponent.
        scale: factor on every gradient; 0-d.
        momenta: the first moments with their signs, see `_sensors.measure.products`.
        params: the parameters.
        counts: what each `sum p^2` is divided by; 1 where it is left out.

    Returns:
        float32, `(5, tensors)`; 0 of what was not given.
    """
    of, partial = _sums_of_chunks(grads, gamma, scale, momenta, params, counts)
    out = torch.empty((5, of.tensors), dtype=torch.float32, device=partial.device)
    _launch(
        partial.device, triton_steps.sums_of_tensors, (of.tensors, 5),
        partial, of.count, of.starts, of.values, of.tensors, out, WIDTH=256,
    )  # fmt: skip
    return out


def mean_squares(tensors: list[Tensor], counts: list[int]) -> Tensor:
    """The sum of the squares of each tensor over a count; float32, a vector."""
    device = tensors[0].device
    return sums_by_tensor((), 2.0, _one(device), params=tensors, counts=counts)[4]


@functools.cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), dtype=torch.float32, device=device)


def _sums_of_chunks(
    grads: Sequence[Tensor],
    gamma: float,
    scale: Tensor,
    momenta: Sequence[tuple[Kept, float]] | None = None,
    params: Sequence[Tensor] | None = None,
    counts: Sequence[int] | None = None,
) -> tuple[Table, Tensor]:
    tensors: Sequence[Tensor] = grads or params or ()
    columns: dict[str, Sequence[int]] = {"numel": list(map(Tensor.numel, tensors))}
    columns["count"] = counts or [1] * len(tensors)
    of_grads = of_first = of_params = _NOTHING
    if grads:
        columns["grad"], of_grads = fit.addresses(grads), Form.of(grads[0])
    if momenta is not None:
        kept = [moment for moment, _ in momenta]
        of_first = _moments(columns, "first", kept)
        columns["sign"] = [int(sign) for _, sign in momenta]
    if params:
        columns["param"], of_params = fit.addresses(params), Form.of(params[0])
    of = table(columns, [*grads, *(params or ())][0].device)
    partial = torch.empty((5, of.count), dtype=torch.float32, device=of.values.device)
    _launch(
        of.values.device, triton_steps.sums_of_chunks, (of.count,),
        of.values, of.tensors, of.chunks, of.tiles, of.count, partial,
        scale.to(of.values.device, torch.float32, non_blocking=True), gamma,
        G=of_grads.format, M=of_first.format, M_SHIFT=of_first.shift, M_TOP=of_first.top,
        P=of_params.format, POWER=_POWERS.get(gamma, 2), ALIGNED=of.aligned, ROWS=ROWS, **OPTIONS,
    )  # fmt: skip
    return of, partial


def _moments(columns: dict[str, Sequence[int]], name: str, kept: Sequence[Any]) -> Form:
    """Fills in where moments lie; returns their form."""
    columns[name] = fit.addresses(list(map(raw, kept)))
    if isinstance(kept[0], Coded):
        columns[f"{name}_scales"] = fit.addresses([coded.scales for coded in kept])
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
    of_second = _NOTHING
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
    _launch(
        device, triton_steps.update_of_chunks, (of.count,),
        of.values, of.tensors, of.chunks, of.tiles, of.starts, of.counters,
        rate, *map(_whole, (orders.beta1, orders.beta2, orders.scale)), orders.ok.view(torch.uint8),
        _as_tensor(orders.key, device) if chance else of.counters,
        _whole(orders.average_weight) if columns.averages else rate,
        _whole(orders.decay_scale) if steered else rate, limits,
        float(l2 or decay), eps,
        P=of_param.format, P_CHANCE=of_param.chance, G=Form.of(grads[0]).format,
        M=of_first.format, M_CHANCE=of_first.chance, M_SHIFT=of_first.shift,
        M_TOP=of_first.top, M_LEAST=of_first.least,
        V=of_second.format, V_CHANCE=of_second.chance, V_SHIFT=of_second.shift,
        V_TOP=of_second.top, V_LEAST=of_second.least,
        NESTEROV=nesterov, COUPLED=bool(l2), AVERAGED=bool(columns.averages),
        LIMITED=bool(columns.limits), STEERED=steered, ALIGNED=of.aligned, ROWS=ROWS,
        **UPDATE_OPTIONS,
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


def _as_tensor(key: Any, device: torch.device) -> Tensor:
    if isinstance(key, Tensor):
        return key.to(torch.int32)
    return torch.full((), int(key), dtype=torch.int32, device=device)


def _launch(device: torch.device, kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any):
    """Starts a kernel; one that fails to compile or to start is set aside.

    Nothing has been written then: what fails later, while it runs, comes as an error of CUDA at a
    place that waits for it, and nothing can go on after that.

    Raises:
        SetAsideError: where it failed.
    """
    here: Any = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with here:
        try:
            kernel[grid](*args, **kwargs)
        except Exception as error:  # whatever a compiler, a cache or a driver may raise
            triton_found.set_aside(device, error)
            raise fit.SetAsideError(str(error)) from error
