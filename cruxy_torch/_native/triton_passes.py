"""The passes in Triton over tensors on CUDA devices, and how they are handed over."""

import contextlib
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
from cruxy_torch._native.triton_tables import Table, constant, table
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


def one(device: torch.device) -> Tensor:
    """The number 1, float32, on a device."""
    return constant(1.0, device)


def decide(settings: Any, law_state: Any, groups: Any, measured: Any) -> list[Orders] | None:
    """See `triton_law.decide`; nothing where it fails."""
    if not triton_found.available(law_state["step"].device):
        return None
    from cruxy_torch._native import triton_law  # which starts kernels by this module

    try:
        return triton_law.decide(settings, law_state, groups, measured)
    except fit.SetAsideError:
        return None


class Together:
    """The sums over gradients of any forms, and the sizes of their parameters in the same pass.

    Attributes:
        squares: the mean square of each parameter, float32; only where `complete`, as the next.
        whole: the sum of the squares of all parameters, float32, 0-d.
        elements: of all parameters.
    """

    def __init__(self, grads: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        self._numbers = {id(grad): i for i, grad in enumerate(grads)}
        self._params, self._measured = params, 0
        self.elements = sum(map(Tensor.numel, params))
        self.whole: Any = None
        self.squares: Any = None
        if params:
            device = params[0].device
            self.squares = torch.empty(len(params), dtype=torch.float32, device=device)

    @property
    def complete(self) -> bool:
        """Whether every parameter was measured."""
        return 0 < len(self._params) == self._measured

    def split(self, lengths: Sequence[int]) -> list[tuple[Tensor, list[int]]]:
        """Mean squares and elements of the first so many, of the next so many, and so on."""
        found, begin = [], 0
        for length in lengths:
            own = slice(begin, begin + length)
            found.append((self.squares[own], list(map(Tensor.numel, self._params[own]))))
            begin += length
        return found

    def sums(
        self,
        grads: list[Tensor],
        gamma: float,
        scale: Tensor,
        momenta: Sequence[tuple[Kept, float]] | None,
    ) -> tuple[Tensor | None, list[int]]:
        """What `_sensors.measure.sums` says of what Triton takes, and the numbers of the rest.

        Raises:
            SetAsideError: where a kernel fails.
        """
        moments = [] if momenta is None else [[kept for kept, _ in momenta]]
        places = [self._numbers.get(id(grad), -1) for grad in grads]
        params: list[Tensor] | None = None
        if self._params and grads and min(places) >= 0:
            params = [self._params[place] for place in places]
            fast, slow = parts([grads, params], moments)
        if params is None or slow:
            params, (fast, slow) = None, parts([grads], moments)
        devices = dict.fromkeys(grads[part[0]].device for part in fast)
        if params is not None and devices.keys() != {self.squares.device}:
            params = None
        totals = [
            self._on_one(
                [part for part in fast if grads[part[0]].device == device],
                grads, gamma, scale, momenta, params, places,
            )
            for device in devices
        ]  # fmt: skip
        if not totals:
            return None, slow
        return totals[0] if len(totals) == 1 else torch.stack(totals).sum(0), slow

    def _on_one(
        self,
        fast: Sequence[Sequence[int]],
        grads: list[Tensor],
        gamma: float,
        scale: Tensor,
        momenta: Sequence[tuple[Kept, float]] | None,
        params: Sequence[Tensor] | None,
        places: Sequence[int],
    ) -> Tensor:
        """The sums over what lies on one device."""
        counts = [max(1, param.numel()) for param in params or ()]
        of, partial = _sums_of_chunks(
            grads, gamma, scale, momenta, params, counts, parts_of=fast, places=places
        )
        out = torch.empty(5, dtype=torch.float32, device=partial.device)
        launch(
            partial.device, triton_steps.sums_of_all, (5 + (of.tensors if params else 0),),
            partial, of.count, of.chunks, of.starts, of.values, of.tensors, out,
            self.squares if params else out, WIDTH=1024,
        )  # fmt: skip
        if params:
            self._measured += len(params)
            self.whole = out[4] if self.whole is None else self.whole + out[4]
        return out[: 2 if momenta is None else 4].to(scale.device, non_blocking=True)


together = Together


def sums(
    grads: list[Tensor],
    gamma: float,
    scale: Tensor,
    momenta: Sequence[tuple[Kept, float]] | None = None,
) -> Tensor:
    """What `_sensors.measure.sums` says, of tensors of one of the `parts`, in one pass."""
    total, _ = Together((), ()).sums(grads, gamma, scale, momenta)
    return torch.zeros(2, dtype=torch.float32, device=scale.device) if total is None else total


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
    launch(
        partial.device, triton_steps.sums_of_tensors, (of.tensors, 5),
        partial, of.count, of.starts, of.values, of.tensors, out, WIDTH=256,
    )  # fmt: skip
    return out


def mean_squares(tensors: list[Tensor], counts: list[int]) -> Tensor:
    """The sum of the squares of each tensor over a count; float32, a vector."""
    device = tensors[0].device
    return sums_by_tensor((), 2.0, one(device), params=tensors, counts=counts)[4]


def _sums_of_chunks(
    grads: Sequence[Tensor],
    gamma: float,
    scale: Tensor,
    momenta: Sequence[tuple[Kept, float]] | None = None,
    params: Sequence[Tensor] | None = None,
    counts: Sequence[int] | None = None,
    parts_of: Sequence[Sequence[int]] | None = None,
    places: Sequence[int] | None = None,
) -> tuple[Table, Tensor]:
    """The table of all tensors, part by part, and the sums over their chunks, a launch a part."""
    tensors: Sequence[Tensor] = grads or params or ()
    parts_of = parts_of or [range(len(tensors))]
    order = [i for part in parts_of for i in part]

    def ordered(column: Sequence[Any]) -> list[Any]:
        return [column[i] for i in order]

    columns: dict[str, Sequence[int]] = {"numel": list(map(Tensor.numel, ordered(tensors)))}
    columns["count"] = ordered(counts) if counts else [1] * len(order)
    if grads:
        columns["grad"] = fit.addresses(ordered(grads))
    if momenta is not None:
        kept = [momenta[i][0] for i in order]
        columns["first"] = fit.addresses(list(map(raw, kept)))
        columns["first_scales"] = _scales(kept)
        columns["sign"] = [int(momenta[i][1]) for i in order]
    if params:
        columns["param"] = fit.addresses(ordered(params))
        columns["limit"] = ordered(places) if places else [0] * len(order)
    of = table(columns, tensors[0].device)
    device = of.values.device
    partial = torch.empty((5, of.count), dtype=torch.float32, device=device)
    scale, begin = scale.to(device, torch.float32, non_blocking=True), 0
    for part in parts_of:
        of_grads = Form.of(grads[part[0]]) if grads else _NOTHING
        of_first = Form.of(momenta[part[0]][0]) if momenta is not None else _NOTHING
        of_params = Form.of(params[part[0]]) if params else _NOTHING
        first, last = of.begins[begin], of.begins[begin + len(part)]
        begin += len(part)
        launch(
            device, triton_steps.sums_of_chunks, (last - first,),
            of.values, of.tensors, of.chunks[first:], of.tiles, of.count, partial[:, first:],
            scale, gamma,
            G=of_grads.format, M=of_first.format, M_SHIFT=of_first.shift, M_TOP=of_first.top,
            P=of_params.format, POWER=_POWERS.get(gamma, 2), ALIGNED=of.aligned, ROWS=ROWS,
            **OPTIONS,
        )  # fmt: skip
    return of, partial


def _scales(kept: Sequence[Any]) -> list[int]:
    """Where the scales of coded moments lie; 0 of others."""
    coded = [i for i, one in enumerate(kept) if isinstance(one, Coded)]
    found = [0] * len(kept)
    for i, address in zip(coded, fit.addresses([kept[i].scales for i in coded]), strict=True):
        found[i] = address
    return found


def _moments(columns: dict[str, Sequence[int]], name: str, kept: Sequence[Any]) -> Form:
    """Fills in where moments lie; returns their form."""
    columns[name] = fit.addresses(list(map(raw, kept)))
    columns[f"{name}_scales"] = _scales(kept)
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
    launch(
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


def launch(
    device: torch.device, kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any
) -> None:
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
