"""The passes of the C library over tensors on the CPU, and how they are handed over."""

import array
import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from cruxy_exact.codes import TINY
from cruxy_torch._columns import Columns
from cruxy_torch._kept import Coded, Kept, raw
from cruxy_torch._native import fit, library
from cruxy_torch._orders import Orders

NAME = "native"
_RULES = fit.Rules("cpu", frozenset({torch.float32}), rounded=False, centralized=True)
parts = functools.partial(fit.parts, _RULES)
misfit = functools.partial(fit.misfit, _RULES)


def sums(
    grads: list[Tensor],
    gamma: float,
    scale: Tensor,
    momenta: Sequence[tuple[Kept, float]] | None = None,
) -> Tensor:
    """What `_sensors.measure.sums` says, of tensors of one of the `parts`, in one pass."""
    out = (ctypes.c_double * 4)()
    arguments = _Sums(
        tensors=len(grads),
        grads=_addresses(grads),
        numel=_counts(list(map(Tensor.numel, grads))),
        gamma=gamma,
        scale=float(scale),
        threads=torch.get_num_threads(),
        out=out,
    )
    if momenta is not None:
        signs = (ctypes.c_float * len(grads))(*(sign for _, sign in momenta))
        arguments.hold(first=_Moments.of([kept for kept, _ in momenta]), signs=signs)
    library.call("cruxy_sums", arguments)
    count = 2 if momenta is None else 4
    return torch.tensor(out[:count], dtype=torch.float64, device="cpu").to(torch.float32)


def together(grads: list[Tensor], params: list[Tensor]) -> None:
    """Parameters are measured in a pass of their own."""


def move(
    kept: Kept, direction: Tensor, rate: Tensor, orders: Orders, decay: float, decay_scale: Any
) -> bool:
    """No tensor is moved alone."""
    return False


def momentum(grad: Tensor, kept: Kept, shape: torch.Size, orders: Orders) -> None:
    """No momentum is taken alone."""


def adam(
    kept: Kept,
    grad: Tensor,
    moments: Sequence[Kept],
    factors: Sequence[Tensor],
    rate: Tensor,
    orders: Orders,
    *,
    nesterov: bool,
    decay: tuple[float, Any],
) -> bool:
    """No tensor is moved alone."""
    return False


def sign(
    kept: Kept,
    grad: Tensor,
    size: Tensor,
    rate: Tensor,
    orders: Orders,
    *,
    decay: tuple[float, Any],
) -> bool:
    """No tensor is moved alone."""
    return False


def matrix(kept: Kept, grad: Tensor, orders: Orders) -> None:
    """No matrix is taken alone."""


def decide(
    settings: Any, law_state: dict[str, Tensor], groups: Sequence[Any], measured: Any
) -> None:
    """Scalars on the CPU are NumPy's."""


def one(device: torch.device) -> Tensor:
    """The number 1, float32, on a device."""
    return torch.ones((), dtype=torch.float32, device=device)


def mean_squares(tensors: list[Tensor], counts: list[int]) -> Tensor:
    """The sum of the squares of each tensor over a count; float32, a vector."""
    out = torch.empty(len(tensors), dtype=torch.float64, device="cpu")
    arguments = _MeanSquares(
        tensors=len(tensors),
        params=_addresses(tensors),
        numel=_counts(list(map(Tensor.numel, tensors))),
        counts=_counts(counts),
        threads=torch.get_num_threads(),
        out=out.data_ptr(),
    )
    library.call("cruxy_mean_squares", arguments)
    return out.to(torch.float32)


def update(
    columns: Columns,
    orders: Orders,
    moments: Sequence[str],
    clocks: Sequence[str] = (),
    *,
    decay: float,
    l2: float = 0.0,
    eps: float = 0.0,
    nesterov: bool = False,
    centralize: bool = False,
) -> None:
    """One step of Adam, or of Lion with one moment, with the averages; of one of the `parts`.

    Args:
        columns: the tensors.
        orders: as numbers.
        moments: names of the first moment and, for Adam, the second.
        clocks: names of the products of both decay rates so far; empty for Lion.
        decay: coefficient of the decay that is added to the update.
        l2: of that which is added to the gradient.
        eps: added to the root of the second moment.
        nesterov: looks one step ahead.
        centralize: subtracts from a gradient of two or more axes its mean over all but the first.
    """
    if not orders.ok:
        return
    params, grads = [raw(p) for p in columns.params], columns.grads
    first = columns.moments[moments[0]]
    arguments = _Update(
        tensors=len(params),
        params=_addresses(params),
        grads=_addresses(grads),
        first=_Moments.of(first),
        numel=_counts(list(map(Tensor.numel, grads))),
        numbers=_counts(fit.first_numbers(first)),
        rate=float(orders.rate),
        beta1=float(orders.beta1),
        beta2=float(orders.beta2),
        scale=float(orders.scale),
        average_weight=float(orders.average_weight),
        average_pull=float(orders.average_pull or 0.0),
        decay=decay,
        l2=l2,
        eps=eps,
        nesterov=nesterov,
        key=int(orders.key),
        threads=torch.get_num_threads(),
    )
    if len(moments) > 1:
        arguments.hold(second=_Moments.of(columns.moments[moments[1]]))
        for field, name in zip(("products1", "products2"), clocks, strict=True):
            arguments.hold(**{field: _numbers([state[name] for state in columns.states])})
    if columns.limits:
        arguments.hold(limits=_numbers([limit.cpu() for limit in columns.limits]))
    if columns.averages:
        arguments.hold(averages=_addresses(columns.averages))
    if centralize:
        rows = [g.numel() // max(len(g), 1) if g.ndim > 1 else 0 for g in grads]
        arguments.hold(row=_counts(rows))
    library.call("cruxy_update", arguments)
    torch.autograd.graph.increment_version(params)  # as torch's own in-place operations do


class _Struct(ctypes.Structure):
    """A struct of the C source, by the names of its fields; keeps alive what it points to."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self._held: list[Any] = []
        self.hold(**fields)

    def hold(self, **fields: Any) -> None:
        """Sets fields: numbers, addresses, and arrays or structs, of which the address is taken."""
        for name, value in fields.items():
            if isinstance(value, ctypes.Array | ctypes.Structure):
                self._held.append(value)
                value = ctypes.addressof(value)
            setattr(self, name, value)


_KINDS = {
    "pointer": ctypes.c_void_p, "long": ctypes.c_int64, "double": ctypes.c_double,
    "float": ctypes.c_float, "int": ctypes.c_int32,
}  # fmt: skip


def _fields(**names: str) -> list[tuple[str, Any]]:
    """The fields of a C struct in its order: their names, by kind."""
    return [(name, _KINDS[kind]) for kind, names in names.items() for name in names.split()]


class _Sums(_Struct):
    """`Sums` of the C source."""

    _fields_ = _fields(
        pointer="grads first signs numel out", long="tensors", double="gamma", float="scale",
        int="threads",
    )  # fmt: skip


class _MeanSquares(_Struct):
    """`MeanSquares` of the C source."""

    _fields_ = _fields(pointer="params numel counts out", long="tensors", int="threads")


class _Update(_Struct):
    """`Update` of the C source."""

    _fields_ = _fields(
        pointer="params grads first second products1 products2 limits averages numel row numbers",
        long="tensors",
        float="rate beta1 beta2 scale average_weight average_pull decay l2 eps",
        int="nesterov key threads",
    )


_FORMATS = {torch.float32: 0, torch.bfloat16: 1}
"""`FLOAT32` and `BFLOAT16` of the C source; 2 is `BYTE` and 3 `NIBBLE`."""


class _Moments(_Struct):
    """`Moments` of the C source: one moment of every tensor, all of one form."""

    _fields_ = _fields(
        pointer="values scales", int="format stochastic is_signed shift", float="top least"
    )

    @classmethod
    def of(cls, column: Sequence[Any]) -> "_Moments":
        """The moments of a column."""
        values = list(map(raw, column))
        moments = cls(values=_addresses(values), stochastic=not isinstance(column[0], Tensor))
        if not isinstance(column[0], Coded):
            moments.format = _FORMATS[values[0].dtype]
            return moments
        code = column[0].code
        moments.hold(
            scales=_addresses([kept.scales for kept in column]),
            format=2 if code.bits == 8 else 3,
            is_signed=code.signed,
            top=code.top,
            shift=code.half.bit_length(),
            least=float(code.scale(numpy.float32(TINY), xp=numpy)),
        )
        return moments


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array:
    return _counts(fit.addresses(tensors))


def _counts(values: list[int]) -> ctypes.Array:
    column = array.array("q", values)
    return (ctypes.c_int64 * len(column)).from_buffer(column)


def _numbers(tensors: Sequence[Tensor]) -> ctypes.Array:
    return _counts(fit.numbers(tensors, "cpu"))
