"""The one frame of an update: gradient in, direction, decay, limit, write, average."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cruxy_torch._actuators.average import average
from cruxy_torch._actuators.centralize import check_centralizable
from cruxy_torch._actuators.direction import Direction
from cruxy_torch._actuators.staged import Staged, in_step
from cruxy_torch._actuators.stepped import Bucket, Frame, SteppedTensor
from cruxy_torch._blocks import buckets, by_device
from cruxy_torch._columns import Columns
from cruxy_torch._distributed.shards import any_sharded, local
from cruxy_torch._groups import limit_shares
from cruxy_torch._kept import Kept, any_by_chance, raw
from cruxy_torch._memory.state import AVERAGE_CODES, as_stepped, kept_average
from cruxy_torch._native.fit import Passes, SetAsideError
from cruxy_torch._orders import Orders
from cruxy_torch._step import Group


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectedGroup(Group):
    """A parameter group's part in a step: what has a gradient, and the direction that it takes.

    Attributes:
        params: the parameters, a `DTensor` where they are sharded.
        columns: parameters and gradients on this rank, with what is kept beside them.
        direction: what a gradient becomes.
        frame: what else the group fixes.
        coded: parameters that take a step, with averages that are kept in fewer bits.
        late: parameters without a gradient now, whose average moves nevertheless.
    """

    params: list[Tensor]
    columns: Columns
    direction: Direction
    frame: Frame
    coded: Sequence[tuple[Tensor, Kept]] = ()
    late: Sequence[tuple[Tensor, Kept]] = ()

    @property
    def rounds(self) -> bool:
        """Whether anything of it may be rounded by chance."""
        averages = [mean for _, mean in (*self.coded, *self.late)]
        columns = (self.columns.params, averages, *self.columns.moments.values())
        return any(map(any_by_chance, columns))

    def momenta(self) -> Sequence[Kept]:
        """The first moment that belongs to each gradient, this rank's shards of them."""
        return self.columns.moments[self.direction.moments[0]]

    def averaged(self) -> Sequence[tuple[Kept, Kept]] | None:
        """This rank's part of each parameter with its average; see `Group`."""
        if self.coded:
            return [(local(param), mean) for param, mean in self.coded]
        pairs = zip(self.columns.params, self.columns.averages, strict=True)
        return list(pairs) if self.columns.averages else None

    def limited(self) -> Sequence[Tensor]:
        """Every tensor that a relative limit bounds; see `Group`."""
        return () if self.relative_limit is None else self.params

    def update(self, orders: Orders, *, native: Passes | None, foreach: bool) -> None:
        """Updates parameters, state and averages in place; see `Group`."""
        if self.frame.centralize:
            check_centralizable(self.grads)
        columns = self.columns
        if orders.limits is not None:
            columns = columns._replace(limits=orders.limits.unbind())
        for part, frame in _decayed(columns, self.frame):
            self._step(part, frame, orders, native, foreach)
        _average(self.coded, orders)
        _average(self.late, orders._replace(average_pull=None))

    def _step(
        self, columns: Columns, frame: Frame, orders: Orders, native: Passes | None, foreach: bool
    ) -> None:
        """The step of some of its tensors, with their averages."""
        take = None if native is None else self.direction.pass_of(native.NAME)
        if native is not None and take is not None and columns.params:
            whole = [c for c in (columns.grads, columns.params, columns.averages) if c]
            moments = list(columns.moments.values())
            fast, slow = native.parts(whole, moments, centralize=frame.centralize)
            for part in fast:
                own = columns.select(part)
                # A kernel rounds once, and a pull on what is rounded has bits of its own.
                apart = orders.average_pull is not None and not _is_float32(own.params[0])
                taken = own._replace(averages=()) if apart else own
                try:
                    take(taken, orders, frame.under(orders))
                except SetAsideError:
                    slow = sorted([*slow, *part])
                    continue
                if apart:
                    average(own.params, own.averages, orders)
            columns = columns.select(slow)
        step = _foreach if foreach and self.direction.foreach is not None else _single
        for device, indices in by_device(columns.params).items():
            here, on_device = columns.select(indices), orders.to(device)
            factors = self.direction.advance(here, on_device)
            framed = frame.under(on_device)
            left = _left(here, self.direction, framed, on_device, factors, native)
            rest = [factors[i] for i in left]
            step(here.select(left), self.direction, framed, on_device, rest, native)
        average(columns.params, columns.averages, orders)


def _decayed(columns: Columns, frame: Frame) -> list[tuple[Columns, Frame]]:
    """The tensors with what decays them: those of fewer than two axes apart where they are spared.

    All in one where nothing is spared or there is nothing to spare.
    """
    axes = [raw(param).ndim for param in columns.params]
    spared = [i for i, ndim in enumerate(axes) if ndim < 2]
    if frame.decay_vectors or not frame.weight_decay or not spared:
        return [(columns, frame)]
    without = (columns.select(spared), frame._replace(weight_decay=0.0))
    others = [i for i, ndim in enumerate(axes) if ndim > 1]
    return [(columns.select(others), frame), without] if others else [without]


def _is_float32(param: Kept) -> bool:
    return isinstance(param, Tensor) and param.dtype == torch.float32


def _average(rows: Sequence[tuple[Tensor, Kept]], orders: Orders) -> None:
    average([local(param) for param, _ in rows], [mean for _, mean in rows], orders)


def group_of(
    index: int,
    options: Mapping[str, Any],
    lists: tuple[list[Tensor], list[Tensor], list[dict[str, Any]], list[int]],
    direction: Direction,
    frame: Frame,
    *,
    bits: int,
    stochastic: bool,
    limit_width: int | None = None,
    late: Sequence[tuple[Tensor, Kept]] = (),
) -> DirectedGroup:
    """The group with this number.

    Args:
        index: of the group.
        options: the parameter group.
        lists: of what has a gradient: parameters, gradients, states, and the number of the first
            element of each.
        direction: see `DirectedGroup`.
        frame: likewise.
        bits: in which the group keeps moments; at 16 they are rounded by chance.
        stochastic: whether bfloat16 parameters are.
        limit_width: from which a relative limit falls with the width, see `width_share`.
        late: see `DirectedGroup`.
    """
    coded: list[tuple[Tensor, Kept]] = []
    params, grads, states, numbers = lists
    columns = as_stepped(
        params, grads, states, numbers, direction.moments, halved=bits == 16, stochastic=stochastic
    )
    if options["averaging"] is None:
        columns = columns._replace(averages=())
    elif any(AVERAGE_CODES in state for state in states):  # no pass of a library takes those
        rows = zip(params, states, numbers, strict=True)
        coded = [(p, kept_average(p, state, number)) for p, state, number in rows]
        columns = columns._replace(averages=())
    unlimited = options["relative_limit"] is None
    lr, (b1, b2) = options["lr"], options.get("betas", (0.0, 0.0))
    return DirectedGroup(
        index=index,
        params=params,
        grads=grads,
        columns=columns,
        direction=direction,
        frame=frame,
        coded=coded,
        late=late,
        lr=lr.detach().reshape(()) if isinstance(lr, Tensor) else lr,
        b1=b1,
        b2=b2,
        maximize=options["maximize"],
        averaging=options["averaging"],
        relative_limit=options["relative_limit"],
        still=options.get("still", False),
        interpolation=options.get("interpolation", 0.0),
        limit_shares=None if unlimited else limit_shares(params, limit_width),
    )


def _left(
    columns: Columns,
    direction: Direction,
    frame: Frame,
    orders: Orders,
    factors: Sequence[Any],
    native: Passes | None,
) -> list[int]:
    """The tensors whose whole step no kernel of a library has taken."""
    every = list(range(len(columns.params)))
    if native is None or type(direction).fused is Direction.fused:
        return every
    rates = _rates(columns, orders)
    return [
        i
        for i in every
        if not direction.fused(
            SteppedTensor(columns, i, frame, orders, native), factors[i], orders, rates[i]
        )
    ]


def _single(
    columns: Columns,
    direction: Direction,
    frame: Frame,
    orders: Orders,
    factors: Sequence[Any],
    native: Passes | None,
) -> None:
    """One step, tensor by tensor: the readable version that the others are held to."""
    rates = _rates(columns, orders)
    sharded = any_sharded(columns.wholes)
    alone = torch.compiler.is_compiling()
    if isinstance(direction, Staged) and (sharded or (direction.joins and not alone)):
        own = None if sharded else native
        tensors = [SteppedTensor(columns, i, frame, orders, own) for i in range(len(rates))]
        for index, block in in_step(direction, tensors, factors, orders, sharded=sharded):
            _move(tensors[index], block, rates[index], direction)
            del block  # and what it holds, before the next is computed
        return
    for index, rate in enumerate(rates):
        tensor = SteppedTensor(columns, index, frame, orders, native)
        _move(tensor, direction.blocks(tensor, factors[index], orders), rate, direction)


def _move(
    tensor: SteppedTensor, block: Callable[[int], Tensor], rate: Tensor, direction: Direction
) -> None:
    for number in range(tensor.blocks):
        tensor.move(number, block(number), rate, finite=direction.is_finite)


def _foreach(
    columns: Columns,
    direction: Direction,
    frame: Frame,
    orders: Orders,
    factors: Sequence[Any],
    native: Passes | None,
) -> None:
    """One step by torch's foreach calls, a bucket of like tensors at a time."""
    moments = [column for column in columns.moments.values() if column]
    for indices in buckets(columns.grads, columns.params, *moments):
        part, own = columns.select(indices), [factors[i] for i in indices]
        if len(indices) == 1:
            # As many calls, and temporaries of a block instead of the whole tensor.
            _single(part, direction, frame, orders, own, native)
            continue
        bucket = Bucket(part, frame, orders)
        directions = direction.foreach(bucket, own, orders)
        bucket.move(directions, _rates(part, orders) if part.limits else orders.rate)


def _rates(columns: Columns, orders: Orders) -> list[Tensor]:
    """The rate of each tensor: the group's, or its own limit where that is smaller."""
    if not columns.limits:
        return [orders.rate] * len(columns.params)
    return [torch.minimum(orders.rate, limit.to(orders.rate.device)) for limit in columns.limits]
