"""Which tensors a library of passes can take: nothing that reaches a pointer is believed unchecked.

A tensor that is not a plain one on the library's device, in order, without gaps and of the shape of
its parameter takes the slower path.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cruxy_torch._columns import Columns
from cruxy_torch._kept import BLOCK_SIZE, Coded, Kept, Rounded, raw
from cruxy_torch._orders import Orders

_PLAIN = {torch.float32, torch.bfloat16}
_TYPES = {Tensor, torch.nn.Parameter}
"""Whose memory is their own; what wraps other tensors has none."""


class SetAsideError(Exception):
    """A library could not take what it was given, and has changed nothing."""


class Passes(Protocol):
    """What a library does: the C library in `passes`, Triton in `triton_passes`."""

    @property
    def NAME(self) -> str:  # noqa: N802
        """Of the method of a `Direction` that calls `update`."""
        ...

    def parts(
        self,
        whole: Sequence[Sequence[Kept]],
        moments: Sequence[Sequence[Any]] = (),
        *,
        centralize: bool = False,
    ) -> tuple[list[list[int]], list[int]]:
        """See `parts`, under the rules of this library."""
        ...

    def misfit(
        self, whole: Sequence[Kept], moments: Sequence[Any], *, centralize: bool = False
    ) -> str:
        """See `misfit`, under the rules of this library."""
        ...

    def sums(
        self,
        grads: list[Tensor],
        gamma: float,
        scale: Tensor,
        momenta: Sequence[tuple[Kept, float]] | None = None,
    ) -> Tensor:
        """What `_sensors.measure.sums` says, of tensors of one of the `parts`, in one pass."""
        ...

    def together(self, grads: list[Tensor], params: list[Tensor]) -> Any:
        """What measures parameters in the pass over their gradients; `None` for nothing.

        It has `sums`, in the place of this library's own, and afterwards `complete`, whether all
        parameters were measured, `split` for their sizes, `whole` and `elements`.

        Args:
            grads: that are going to be measured.
            params: that of each.
        """
        ...

    def decide(
        self, settings: Any, law_state: dict[str, Tensor], groups: Sequence[Any], measured: Any
    ) -> list[Orders] | None:
        """`_decide.decide` in one launch, and what it changes kept; `None` where there is none."""
        ...

    def one(self, device: torch.device) -> Tensor:
        """The number 1, float32, on a device."""
        ...

    def move(
        self,
        kept: Kept,
        direction: Tensor,
        rate: Tensor,
        orders: Orders,
        decay: float,
        decay_scale: Any,
    ) -> bool:
        """`p <- p - rate (direction + decay p)` of one tensor; whether it was done."""
        ...

    def momentum(
        self, grad: Tensor, kept: Kept, shape: torch.Size, orders: Orders
    ) -> Tensor | None:
        """What `Momentum` gives of a raw gradient, whose moment takes its step; or `None`."""
        ...

    def adam(
        self,
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
        """Adam's step of one tensor, see `triton_tensors.adam`; whether it was done."""
        ...

    def sign(
        self,
        kept: Kept,
        grad: Tensor,
        size: Tensor,
        rate: Tensor,
        orders: Orders,
        *,
        decay: tuple[float, Any],
    ) -> bool:
        """A step along the sign of one gradient; whether it was done."""
        ...

    def matrix(self, kept: Kept, grad: Tensor, orders: Orders) -> Any:
        """What a factored direction needs of a matrix, see `triton_tensors.Matrix`; or `None`."""
        ...

    def mean_squares(self, tensors: list[Tensor], counts: list[int]) -> Tensor:
        """The sum of the squares of each tensor over a count; float32, a vector."""
        ...

    def update(
        self,
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
        """One step of Adam, or of Lion with one moment, of one of the `parts`."""
        ...


class Rules(NamedTuple):
    """What a library takes.

    Attributes:
        device: the type of the device.
        whole: dtypes of gradients, parameters and averages.
        rounded: whether parameters may be rounded by chance.
        centralized: whether gradients may be centralized.
    """

    device: str
    whole: frozenset[torch.dtype]
    rounded: bool
    centralized: bool


def parts(
    rules: Rules,
    whole: Sequence[Sequence[Kept]],
    moments: Sequence[Sequence[Any]] = (),
    *,
    centralize: bool = False,
) -> tuple[list[list[int]], list[int]]:
    """The rows of equally long columns that can take this path, by how they are kept; the rest.

    All of a row must lie on one device, in one order without gaps, and have one shape. What is
    coded or rounded belongs to a row that lies row by row and is not centralized.

    Args:
        rules: of the library.
        whole: columns that must be of the rules' dtypes, plain tensors in the first.
        moments: columns that may also be kept in fewer bits.
        centralize: whether gradients of two or more axes are.
    """
    if not (centralize and not rules.centralized) and _all_fit(rules, whole, moments):
        return [list(range(len(whole[0])))] if whole[0] else [], []
    alike: dict[tuple[Any, ...], list[int]] = {}
    slow = []
    for i, row in enumerate(zip(*whole, *moments, strict=True)):
        forms = tuple(map(_form, row))
        if _misfit(rules, row, forms, len(whole), centralize):
            slow.append(i)
        else:
            alike.setdefault((row[0].device, *forms), []).append(i)
    return list(alike.values()), slow


_DTYPE, _SHAPE, _DEVICE = map(operator.attrgetter, ("dtype", "shape", "device"))
_ON = {"cpu": operator.attrgetter("is_cpu"), "cuda": operator.attrgetter("is_cuda")}
_IS_CONTIGUOUS, _IS_NEG = map(operator.methodcaller, ("is_contiguous", "is_neg"))


def _all_fit(
    rules: Rules, whole: Sequence[Sequence[Kept]], moments: Sequence[Sequence[Any]]
) -> bool:
    """Whether all rows fit and are kept alike: what `misfit` says, a column at a time.

    Most models are so, and a step of many small tensors is mostly this check.
    """
    shapes = None
    for column in (*whole, *moments):
        if not _TYPES.issuperset(map(type, column)):
            return False
        shapes = shapes or list(map(_SHAPE, column))
        alike = len(set(map(_DTYPE, column))) <= 1 and list(map(_SHAPE, column)) == shapes
        here = map(_ON[rules.device], column)
        if not (alike and all(here) and all(map(_IS_CONTIGUOUS, column))):
            return False
        if any(map(_IS_NEG, column)):
            return False
    if rules.device != "cpu" and len({_DEVICE(t) for c in (*whole, *moments) for t in c}) > 1:
        return False
    return rules.whole.issuperset(_DTYPE(column[0]) for column in whole if column) and (
        _PLAIN.issuperset(_DTYPE(column[0]) for column in moments if column)
    )


def _form(kept: Kept) -> Any:
    if isinstance(kept, Tensor):
        return kept.dtype
    return kept.code if isinstance(kept, Coded) else Rounded


def misfit(
    rules: Rules, whole: Sequence[Kept], moments: Sequence[Any], *, centralize: bool = False
) -> str:
    """Why a row of columns cannot take this path, in a few words; empty where it can."""
    row = (*whole, *moments)
    return _misfit(rules, row, tuple(map(_form, row)), len(whole), centralize)


def _misfit(
    rules: Rules, row: Sequence[Any], forms: tuple[Any, ...], wholes: int, centralize: bool
) -> str:
    shape = row[0].shape  # of a gradient, which is kept as it is
    for form in forms[:wholes]:
        if form is Rounded and not rules.rounded:
            return "bfloat16 rounded by chance"
        if form is not Rounded and form not in rules.whole:
            return f"dtype {form}"
    plain = _PLAIN.issuperset(forms)
    if centralize and len(shape) > 1 and not (plain and rules.centralized):
        return "centralized, with moments in few bits" if rules.centralized else "centralized"
    tensors = row if plain else [raw(kept) for kept in row if not isinstance(kept, Coded)]
    for tensor in tensors:
        if type(tensor) not in _TYPES:
            return f"class {type(tensor).__name__}"
        if tensor.device.type != rules.device:
            return f"device {tensor.device.type}"
        if tensor.device != row[0].device:
            return "devices that differ"
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
    coded = [kept for kept in row if isinstance(kept, Coded)]
    whole = all(_is_whole(kept, shape, row[0].device) for kept in coded)
    return "" if whole else "codes that do not fill their tensor"


def _is_whole(kept: Coded, shape: torch.Size, device: torch.device) -> bool:
    """Whether codes and scales are those of a tensor of this shape, as a library takes them."""
    count = -(-shape.numel() // BLOCK_SIZE)
    wanted = ((kept.codes, (count, BLOCK_SIZE * kept.code.bits // 8)), (kept.scales, (count,)))
    return kept.shape == shape and all(
        type(tensor) in _TYPES
        and tensor.device == device
        and tuple(tensor.shape) == size
        and tensor.is_contiguous()
        and tensor.element_size() == width
        for (tensor, size), width in zip(wanted, (1, 2), strict=True)
    )


def _channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def first_numbers(column: Sequence[Any]) -> list[int]:
    """The number of each tensor's first element; 0 where nothing is rounded by chance."""
    plain = isinstance(column[0], Tensor)
    return [0] * len(column) if plain else [kept.first for kept in column]


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where tensors lie.

    Raises:
        RuntimeError: where one lies nowhere, since its storage was given back.
    """
    where = list(map(Tensor.data_ptr, tensors))
    if 0 in where and any(t.numel() for t in tensors if not t.data_ptr()):
        raise RuntimeError(
            "a tensor has elements and no storage, which something has freed or resized; gather "
            "parameters before step()."
        )
    return where


def scales(column: Sequence[Any]) -> list[int]:
    """Where the scales of coded moments lie; 0 of others."""
    coded = [i for i, kept in enumerate(column) if isinstance(kept, Coded)]
    found = [0] * len(column)
    for i, address in zip(coded, addresses([column[i].scales for i in coded]), strict=True):
        found[i] = address
    return found


def numbers(tensors: Sequence[Tensor], device: str) -> list[int]:
    """The addresses of numbers that a library reads and writes as float32.

    Raises:
        ValueError: where one is anything else.
    """
    kinds = {(t.dtype, t.numel(), t.device.type) for t in tensors}
    if not kinds <= {(torch.float32, 1, device)}:
        raise ValueError(
            "the counters beside a parameter must be single float32 numbers on its device, got "
            f"{sorted(map(str, kinds))}; load the state with load_state_dict, which keeps them as "
            "they were."
        )
    return addresses(tensors)
