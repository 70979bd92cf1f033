"""The passes of the C library over tensors: which can take it, and how they are handed over.

Nothing that reaches a pointer is believed unchecked: a tensor that is not a plain one on the CPU,
in order, without gaps and of the shape of its parameter takes the slower path.
"""

import array
import ctypes
import operator
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from cruxy_exact.codes import TINY
from cruxy_torch._columns import Columns
from cruxy_torch._kept import BLOCK_SIZE, Coded, Kept, Rounded, raw
from cruxy_torch._native import library
from cruxy_torch._orders import Orders

_PLAIN = {torch.float32, torch.bfloat16}
_TYPES = {Tensor, torch.nn.Parameter}
"""Whose memory is their own; what wraps other tensors has none."""


def parts(
    whole: Sequence[Sequence[Kept]],
    moments: Sequence[Sequence[Any]] = (),
    *,
    centralize: bool = False,
) -> tuple[list[list[int]], list[int]]:
    """The rows of equally long columns that can take this path, by how moments are kept; the rest.

    All of a row must lie on the CPU, in one order without gaps, and have one shape. What is coded
    or rounded belongs to a row that lies row by row and is not centralized.

    Args:
        whole: columns that must be float32, plain tensors in the first.
        moments: columns that may also be kept in fewer bits.
        centralize: whether gradients of two or more axes are.
    """
    if _all_fit(whole, moments):
        return [list(range(len(whole[0])))] if whole[0] else [], []
    alike: dict[tuple[Any, ...], list[int]] = {}
    slow = []
    for i, row in enumerate(zip(*whole, *moments, strict=True)):
        forms = tuple(map(_form, row))
        if _misfit(row, forms, len(whole), centralize):
            slow.append(i)
        else:
            alike.setdefault(forms, []).append(i)
    return list(alike.values()), slow


_DTYPE, _SHAPE, _IS_CPU = map(operator.attrgetter, ("dtype", "shape", "is_cpu"))
_IS_CONTIGUOUS, _IS_NEG = map(operator.methodcaller, ("is_contiguous", "is_neg"))


def _all_fit(whole: Sequence[Sequence[Kept]], moments: Sequence[Sequence[Any]]) -> bool:
    """Whether all rows fit and are kept alike: what `misfit` says, a column at a time.

    Most models are so, and a step of many small tensors is mostly this check.
    """
    shapes = None
    for column in (*whole, *moments):
        if not _TYPES.issuperset(map(type, column)):
            return False
        shapes = shapes or list(map(_SHAPE, column))
        alike = len(set(map(_DTYPE, column))) <= 1 and list(map(_SHAPE, column)) == shapes
        if not (alike and all(map(_IS_CPU, column)) and all(map(_IS_CONTIGUOUS, column))):
            return False
        if any(map(_IS_NEG, column)):
            return False
    return {torch.float32}.issuperset(_DTYPE(column[0]) for column in whole if column) and (
        _PLAIN.issuperset(_DTYPE(column[0]) for column in moments if column)
    )


def _form(kept: Kept) -> Any:
    if isinstance(kept, Tensor):
        return kept.dtype
    return kept.code if isinstance(kept, Coded) else Rounded


def misfit(whole: Sequence[Kept], moments: Sequence[Any], *, centralize: bool = False) -> str:
    """Why a row of columns cannot take this path, in a few words; empty where it can."""
    row = (*whole, *moments)
    return _misfit(row, tuple(map(_form, row)), len(whole), centralize)


def _misfit(row: Sequence[Any], forms: tuple[Any, ...], wholes: int, centralize: bool) -> str:
    shape = row[0].shape  # of a gradient, which is kept as it is
    for form in forms[:wholes]:
        if form is not torch.float32:
            return "bfloat16 rounded by chance" if form is Rounded else f"dtype {form}"
    plain = _PLAIN.issuperset(forms)
    if not plain and centralize and len(shape) > 1:
        return "centralized, with moments in few bits"
    tensors = row if plain else [raw(kept) for kept in row if not isinstance(kept, Coded)]
    for tensor in tensors:
        if type(tensor) not in _TYPES:
            return f"class {type(tensor).__name__}"
        if not tensor.is_cpu:
            return f"device {tensor.device.type}"
        if tensor.shape != shape:
            return "shapes that differ"
        if tensor.dtype not in _PLAIN:
            return f"dtype {tensor.dtype} of a moment"
        if tensor.is_neg():
            return "a view that is negated when it is read"
    if plain and all(map(_channels_last, tensors)):
        return ""
    if not all(map(_IS_CONTIGUOUS, tensors)):
        return "layout: not all in one order without gaps"
    whole = plain or all(_is_whole(kept, shape) for kept in row if isinstance(kept, Coded))
    return "" if whole else "codes that do not fill their tensor"


def _is_whole(kept: Coded, shape: torch.Size) -> bool:
    """Whether codes and scales are those of a tensor of this shape, as the library takes them."""
    count = -(-shape.numel() // BLOCK_SIZE)
    wanted = ((kept.codes, (count, BLOCK_SIZE * kept.code.bits // 8)), (kept.scales, (count,)))
    return kept.shape == shape and all(
        type(tensor) in _TYPES
        and tensor.is_cpu
        and tuple(tensor.shape) == size
        and tensor.is_contiguous()
        and tensor.element_size() == width
        for (tensor, size), width in zip(wanted, (1, 2), strict=True)
    )


def _channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


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
        numbers=_counts(_first_numbers(first)),
        rate=float(orders.rate),
        beta1=float(orders.beta1),
        beta2=float(orders.beta2),
        scale=float(orders.scale),
        average_weight=float(orders.average_weight),
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


def _first_numbers(column: Sequence[Any]) -> list[int]:
    """The number of each tensor's first element; 0 where nothing is rounded by chance."""
    plain = isinstance(column[0], Tensor)
    return [0] * len(column) if plain else [kept.first for kept in column]


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
        float="rate beta1 beta2 scale average_weight decay l2 eps",
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
    """Where tensors lie.

    Raises:
        RuntimeError: where one lies nowhere, since its storage was given back.
    """
    addresses = list(map(Tensor.data_ptr, tensors))
    if 0 in addresses and any(t.numel() for t in tensors if not t.data_ptr()):
        raise RuntimeError(
            "a tensor has elements and no storage, which something has freed or resized; gather "
            "parameters before step()."
        )
    return _counts(addresses)


def _counts(values: list[int]) -> ctypes.Array:
    column = array.array("q", values)
    return (ctypes.c_int64 * len(column)).from_buffer(column)


def _numbers(tensors: Sequence[Tensor]) -> ctypes.Array:
    """The addresses of numbers that the library reads and writes as float32.

    Raises:
        ValueError: where one is anything else.
    """
    kinds = {(t.dtype, t.numel(), t.is_cpu) for t in tensors}
    if not kinds <= {(torch.float32, 1, True)}:
        raise ValueError(
            "the counters beside a parameter must be single float32 numbers on its device, got "
            f"{sorted(map(str, kinds))}; load the state with load_state_dict, which keeps them as "
            "they were."
        )
    return _addresses(tensors)
