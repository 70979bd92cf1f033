"""Parts of a tensor with a size and a rate of their own: rows, blocks, slices of fused q, k, v."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cruxy_control.checks import check_bounds, check_count, check_range
from cruxy_control.formulas import trust as formulas
from cruxy_control.formulas.trust import ANY_RATIO, RMS_BLOCK
from cruxy_control.signals import root
from cruxy_control.slices import Slices, check_slices
from cruxy_torch._actuators.direction import Direction
from cruxy_torch._actuators.directions import Wrapped
from cruxy_torch._actuators.staged import (
    Stages,
    held,
    mean_square,
    side_by_side,
    stages_of,
    total,
)
from cruxy_torch._actuators.stepped import SteppedTensor
from cruxy_torch._columns import Columns
from cruxy_torch._distributed.shards import local, shard_begin
from cruxy_torch._kept import assign
from cruxy_torch._orders import Orders


class Part(NamedTuple):
    """How a tensor is divided.

    Attributes:
        per: `"tensor"`, `"row"` (every vector along the last axis), `"block"` or `"slice"`.
        slices: where the slices lie, for `"slice"`.
        begin: where along their axis this rank's shard begins.
    """

    per: str
    slices: Slices | None = None
    begin: int = 0


def parts_of(columns: Columns, per: str, slices: Slices | None) -> list[Part]:
    """How each tensor of a step is divided; one of fewer than two axes has no rows."""
    parts = []
    if slices is not None:  # ranges that came as lists could not be looked up
        ranges: Any = (tuple(map(tuple, part)) for _, part in slices.parts())
        slices = Slices(slices.axis, *ranges)
    for whole in columns.wholes:
        if slices is not None:
            parts.append(Part(per, slices, shard_begin(whole, slices.axis)))
        else:
            divided = whole.ndim > 1 if per == "row" else whole.ndim > 0
            parts.append(Part(per if divided else "tensor"))
    return parts


def names_of(slices: Slices) -> list[str]:
    """The slices that there are: a tensor may have no queries."""
    return [name for name, ranges in slices.parts() if ranges]


def mean_squares(blocks: Iterable[Tensor], tensor: SteppedTensor, part: Part) -> Stages[Tensor]:
    """The mean square of every part of a tensor, over all ranks but for blocks, a shard's own.

    Args:
        blocks: all of it, on this rank, in order.
        tensor: which it is of.
        part: how it is divided.

    Returns:
        `()` for a tensor; one element along the last axis for this rank's rows, and for blocks as
        many as there are; `(slices,)`.
    """
    if part.per == "tensor":
        return (yield from mean_square(blocks, tensor))
    squares = (block.square() for block in blocks)
    if part.slices is not None:
        return (yield from _of_slices(squares, tensor, part, part.slices))
    if part.per == "row":
        last = len(tensor.shape) - 1
        sums = torch.cat([square.sum(-1, keepdim=True) for square in squares])
        return (yield from total(sums, last)) / max(1, tensor.shape[-1])
    return torch.cat([_block_means(square) for square in squares])


def _of_slices(
    squares: Iterable[Tensor], tensor: SteppedTensor, part: Part, slices: Slices
) -> Stages[Tensor]:
    axis = slices.axis
    others = [i for i in range(len(tensor.shape)) if i != axis]
    sums = [square.sum(others) if others else square for square in squares]
    along = torch.cat(sums) if axis == 0 else torch.stack(sums).sum(0)
    members = _members(slices, along.device)[:, part.begin : part.begin + len(along)]
    totals = (yield from total((members * along).sum(1))).unbind()
    row = tensor.numel // tensor.shape[axis]
    sizes = [slices.sizes[name] * row for name in names_of(slices)]
    return torch.stack([one / max(1, size) for one, size in zip(totals, sizes, strict=True)])


@functools.lru_cache(maxsize=64)  # a copy to the device once, not in every step
def _members(slices: Slices, device: torch.device) -> Tensor:
    """Which indices along the axis are in which slice; bool, `(slices, indices)`."""
    members = torch.zeros(
        (len(names_of(slices)), sum(slices.sizes.values())), dtype=torch.bool, device="cpu"
    )
    for row, name in zip(members, names_of(slices), strict=True):
        for start, stop in getattr(slices, name):
            row[start:stop] = True
    return members.to(device)


def _block_means(square: Tensor) -> Tensor:
    """The mean of each block along the last axis, and of what is left over."""
    parts = square.split(RMS_BLOCK, dim=-1)
    return torch.stack([part.mean(-1) for part in parts], dim=-1) if parts else square


def spread(values: Tensor, tensor: SteppedTensor, number: int, x: Tensor, part: Part) -> Tensor:
    """What each part of a tensor has, in a shape that broadcasts to one of its blocks.

    Args:
        values: of every part, as `mean_squares` gives them.
        tensor: which they are of.
        number: of the block.
        x: the block.
        part: how the tensor is divided.
    """
    if part.per == "tensor":
        return values
    place = tensor.place(number)
    if part.slices is not None:
        axis = part.slices.axis
        members = _members(part.slices, values.device)
        along = torch.where(members, values[:, None], 0.0).sum(0)
        whole = along[part.begin :]
        own = whole[place] if axis == 0 else whole
        own = own[: x.shape[axis]]
        return own.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    own = values[place]
    if part.per == "block":
        return own.repeat_interleave(RMS_BLOCK, dim=-1)[..., : x.shape[-1]]
    return own


@dataclasses.dataclass(frozen=True)
class ScaleSlices(Wrapped):
    """Multiplies the slices of fused tensors by rates of their own: those of q, k and v.

    `python -m benchmarks components` measures what Tiger's rates of q, k and v are worth.

    Attributes:
        inner: the direction.
        slices: where queries, keys and values lie, in every tensor that is stepped.
        rates: a factor of at least 0 by `"q"`, `"k"`, `"v"`; what has none is 1.

    Raises:
        ValueError: where a rate is below 0 or that of no slice; from `step` where the slices do not
            fill their axis of a tensor.

    Examples:
        >>> import torch
        >>> import cruxy_torch
        >>> from cruxy_control.slices import blocks
        >>> qkv = torch.nn.Parameter(torch.ones(6))
        >>> direction = cruxy_torch.ScaleSlices(
        ...     cruxy_torch.SignBlend(weight=0.0), blocks(2, 2, 2), {"k": 0.5, "v": 2.0}
        ... )
        >>> optimizer = cruxy_torch.CruxyOptimizer(
        ...     [qkv], lr=0.1, weight_decay=0.0, direction=direction
        ... )
        >>> qkv.sum().backward()
        >>> _ = optimizer.step()
        >>> (1.0 - qkv.detach()) / optimizer.telemetry()["learning_rate"]
        tensor([1.0000, 1.0000, 0.5000, 0.5000, 2.0000, 2.0000])
    """

    inner: Direction
    slices: Slices
    rates: Mapping[str, float]

    def __post_init__(self) -> None:
        for name, rate in self.rates.items():
            if name not in ("q", "k", "v"):
                raise ValueError(
                    f'rates must be of "q", "k" and "v", got {name!r}; give one of those.'
                )
            check_range(f"rates[{name!r}]", rate, 0.0, remedy="1 changes nothing")

    def start(self, state: dict[str, Any], param: Tensor, add: Callable[[str], None]) -> None:
        """Adds what `inner` keeps."""
        check_slices("a parameter", self.slices, tuple(param.shape))
        super().start(state, param, add)

    def own_factors(self, columns: Columns, orders: Orders) -> Sequence[Any]:
        """Of each tensor its part, and the rates of its slices."""
        if not columns.params:
            return []
        chosen = [self.rates.get(name, 1.0) for name in names_of(self.slices)]
        rates = torch.stack([torch.full_like(orders.rate, rate) for rate in chosen])
        return [(part, rates) for part in parts_of(columns, "slice", self.slices)]

    def stages(
        self, tensor: SteppedTensor, factors: Any, orders: Orders
    ) -> Stages[Callable[[int], Tensor]]:
        """The direction, its slices multiplied."""
        factors, (part, rates) = factors
        inner = yield from stages_of(self.inner, tensor, factors, orders)

        def block(number: int) -> Tensor:
            u = inner(number)
            return u * spread(rates, tensor, number, u, part)

        return block


@dataclasses.dataclass(frozen=True)
class BalanceSlices(Wrapped):
    r"""Finds rates for the slices of fused tensors that make their steps alike.

    Every 25 good steps each slice is pulled towards the median of the slices of its tensor, in two
    things: the root mean square $r$ of its step and its trust ratio
    $T = \max(\mathrm{rms}(\theta), 10^{-3}) / r$, both with the multiplier $m$ of the slice:

    $$
    D = \sqrt{0.7 \ln^2 \frac{\max r}{\min r} + 0.3 \ln^2 \frac{\max T}{\min T}}, \qquad
    m \leftarrow m \exp\Big(\frac{D}{1 + D} \Big(0.7 \ln \frac{\mathrm{med}\, r}{r}
    + 0.3 \ln \frac{T}{\mathrm{med}\, T}\Big)\Big)
    $$

    A correction is at most `1 - clip` to `1 + clip`, a multiplier at least 0.7 and at most 1.3.
    The period, the weights of $D$ and the bounds are those of Tiger, the strength $D / (1 + D)$ and
    `clip` this package's. Of a tensor in several blocks the whole direction is held meanwhile.
    Nothing measured so far speaks for rates by slices.

    The multipliers are `optimizer.state[parameter]["slice_rates"]`, float32, in the order q, k, v.

    Attributes:
        inner: the direction.
        slices: see `ScaleSlices`.
        every: good steps of a tensor between two corrections, at least 1.
        clip: how far from 1 a correction is at most, in `(0, 1)`.
        bounds: the smallest and the largest multiplier, around 1.

    Raises:
        ValueError: where a number is outside its range; from `step` where the slices do not fill
            their axis of a tensor.

    Examples:
        >>> import torch
        >>> import cruxy_torch
        >>> from cruxy_control.slices import blocks
        >>> qkv = torch.nn.Parameter(torch.ones(3))
        >>> direction = cruxy_torch.BalanceSlices(
        ...     cruxy_torch.SignBlend(weight=1.0), blocks(1, 1, 1), every=1
        ... )
        >>> optimizer = cruxy_torch.CruxyOptimizer([qkv], direction=direction)
        >>> (qkv * torch.tensor([1.0, 2.0, 0.5])).sum().backward()
        >>> _ = optimizer.step()
        >>> optimizer.state[qkv]["slice_rates"]
        tensor([1.0000, 0.9000, 1.1000])
    """

    inner: Direction
    slices: Slices
    every: int = formulas.BALANCE_EVERY
    clip: float = formulas.BALANCE_CLIP
    bounds: tuple[float, float] = formulas.BALANCE_BOUNDS

    def __post_init__(self) -> None:
        check_count("every", self.every, 1, remedy="25 is Tiger's")
        remedy = "0.1 corrects by a tenth at most"
        check_range("clip", self.clip, 0.0, 1.0, lower_open=True, upper_open=True, remedy=remedy)
        remedy = "use (0.7, 1.3)"
        check_bounds("bounds", self.bounds, 0.0, math.inf, around=1.0, remedy=remedy)

    def start(self, state: dict[str, Any], param: Tensor, add: Callable[[str], None]) -> None:
        """Adds what `inner` keeps, a counter and the multipliers."""
        check_slices("a parameter", self.slices, tuple(param.shape))
        if "slice_rates" not in state:
            device, count = local(param).device, len(names_of(self.slices))
            state["slice_step"] = torch.zeros((), dtype=torch.int32, device=device)
            state["slice_rates"] = torch.ones(count, dtype=torch.float32, device=device)
        super().start(state, param, add)

    def own_factors(self, columns: Columns, orders: Orders) -> Sequence[Any]:
        """Of each tensor its part, and whether its multipliers are to be corrected."""
        if not columns.states:
            return []
        counters = [state["slice_step"] for state in columns.states]
        counts = torch.stack(counters) + orders.ok
        assign(counters, counts.unbind())
        due = ((counts % self.every == 0) & orders.ok).unbind()
        return list(zip(parts_of(columns, "slice", self.slices), due, strict=True))

    def stages(
        self, tensor: SteppedTensor, factors: Any, orders: Orders
    ) -> Stages[Callable[[int], Tensor]]:
        """The direction, its slices multiplied."""
        factors, (part, due) = factors
        u = yield from held(self.inner, tensor, factors, orders)
        values = map(tensor.value, range(tensor.blocks))
        each = yield from side_by_side(*(mean_squares(x, tensor, part) for x in (u, values)))
        size, own = (root(square, xp=torch) for square in each)
        trust = formulas.trust_ratio(own, size, ANY_RATIO, formulas.TRUST_FLOOR, xp=torch)
        kept = tensor.state["slice_rates"]
        new, _ = formulas.balance_slices(kept, size, trust, self.clip, self.bounds, xp=torch)
        kept.copy_(torch.where(due, new, kept))
        return lambda i: u[i] * spread(kept, tensor, i, u[i], part)
