"""Directions that wait for sums over ranks: all tensors come to each wait together.

Where tensors are sharded, a sum over all ranks is a message. A direction asks for its sums by
`yield` instead of taking them, so that those of all tensors go in one message along each axis of a
mesh.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from cruxy_control.signals import root
from cruxy_torch._actuators.direction import Direction
from cruxy_torch._actuators.stepped import SteppedTensor
from cruxy_torch._distributed.shards import add_over_ranks, shard_elements
from cruxy_torch._distributed.whole import OfMatrices, each_on_one_rank, stacks
from cruxy_torch._orders import Orders

T = TypeVar("T")

Wanted = tuple[Tensor, int | OfMatrices | None]
"""A sum over this rank's part of a tensor, and the axis that was summed over, `None` for all; or
this rank's part of a tensor, and a function of its matrices, of whose result its part is wanted."""

Stages = Generator[list[Wanted], list[Tensor], T]
"""Asks for sums, gets them over all ranks, and ends with something."""

HELD = 1 << 26
"""Elements of shards that are held between two stages, at most, beside one tensor."""


class Staged(Direction):
    """A direction that writes `stages` instead of `blocks`.

    Attributes:
        holds: whether tensors as large as a parameter are held between stages.
        joins: whether plain tensors of one shape are quicker together than one by one.
    """

    holds: bool = True
    joins: bool = False

    def stages(
        self, tensor: SteppedTensor, factors: Any, orders: Orders
    ) -> Stages[Callable[[int], Tensor]]:
        """As `blocks`, but for the sums over ranks, which are asked for by `yield`."""
        raise TypeError(f"{type(self).__name__} must write stages().")

    def blocks(
        self, tensor: SteppedTensor, factors: Any, orders: Orders
    ) -> Callable[[int], Tensor]:
        """The direction of one tensor, whose sums nobody else's wait for."""
        stages = self.stages(tensor, factors, orders)
        try:
            wanted = next(stages)
            while True:
                wanted = stages.send([_alone(tensor, *one) for one in wanted])
        except StopIteration as end:
            return end.value


def stages_of(
    direction: Direction, tensor: SteppedTensor, factors: Any, orders: Orders
) -> Stages[Callable[[int], Tensor]]:
    """The stages of any direction; none of one that has only `blocks`."""
    if isinstance(direction, Staged):
        return (yield from direction.stages(tensor, factors, orders))
    return direction.blocks(tensor, factors, orders)


def held(
    direction: Direction, tensor: SteppedTensor, factors: Any, orders: Orders
) -> Stages[list[Tensor]]:
    """The whole direction of a tensor, all of its blocks."""
    block = yield from stages_of(direction, tensor, factors, orders)
    return [block(number) for number in range(tensor.blocks)]


def as_it_is(value: T) -> Stages[T]:
    """Ends with this, and asks for nothing."""
    yield from ()
    return value


def total(part: Tensor, axis: int | None = None) -> Stages[Tensor]:
    """One sum over all ranks."""
    (whole,) = yield [(part, axis)]
    return whole


def mean_square(blocks: Iterable[Tensor], tensor: SteppedTensor) -> Stages[Tensor]:
    """The mean of the squares of all blocks of a tensor, over all ranks; 0 of no elements."""
    own = torch.stack([block.square().sum() for block in blocks]).sum()
    return (yield from total(own)) / max(1, tensor.numel)


def root_mean_square(blocks: Iterable[Tensor], tensor: SteppedTensor) -> Stages[Tensor]:
    """The root of that."""
    return root((yield from mean_square(blocks, tensor)), xp=torch)


def of_matrices(f: Callable[[Tensor, int], Tensor], part: Tensor, axes: int) -> Stages[Tensor]:
    """This rank's part of a function of whole matrices, each of which one rank computes.

    Args:
        f: of all matrices of a tensor, or of some, and of how many axes count them.
        part: this rank's part of the tensor.
        axes: how many of the first axes count matrices; 0 where the tensor is one.
    """
    (own,) = yield [(part, OfMatrices(f, axes))]
    return own


def side_by_side(*each: Stages[Any]) -> Stages[list[Any]]:
    """Several that know nothing of each other, as one: their sums are asked for together."""
    results: list[Any] = [None] * len(each)
    waiting = dict(enumerate(each))
    answers: dict[int, list[Tensor] | None] = dict.fromkeys(waiting)
    while waiting:
        asked: dict[int, list[Wanted]] = {}
        for index, stages in list(waiting.items()):
            try:
                answer = answers[index]
                asked[index] = next(stages) if answer is None else stages.send(answer)
            except StopIteration as end:
                results[index] = end.value
                del waiting[index]
        if not asked:
            break
        wholes = iter((yield [wanted for own in asked.values() for wanted in own]))
        answers = {index: [next(wholes) for _ in own] for index, own in asked.items()}
    return results


def in_step(
    direction: Staged,
    tensors: Sequence[SteppedTensor],
    factors: Sequence[Any],
    orders: Orders,
    *,
    sharded: bool,
) -> Iterator[tuple[int, Callable[[int], Tensor]]]:
    """The place and the blocks of every tensor, all stages taken together.

    Where a direction holds what is as large as a parameter, only so many tensors go together that
    `HELD` elements of shards are held, the same ones on all ranks. Of plain tensors those of one
    shape go together, as many as are stacked.
    """
    if not sharded:
        packs = stacks({i: (t.shape, t.whole.device) for i, t in enumerate(tensors)})
    else:
        packs = _packs(tensors) if direction.holds else [[*range(len(tensors))]]
    for places in packs:
        yield from _in_one_pack(direction, tensors, factors, orders, places)


def _in_one_pack(
    direction: Staged,
    tensors: Sequence[SteppedTensor],
    factors: Sequence[Any],
    orders: Orders,
    places: list[int],
) -> Iterator[tuple[int, Callable[[int], Tensor]]]:
    """Those of some tensors; what they hold is let go of with the last."""
    chosen = [tensors[place] for place in places]
    for tensor in chosen:
        tensor.keeps = False
    each = [
        direction.stages(tensor, factors[place], orders)
        for tensor, place in zip(chosen, places, strict=True)
    ]
    blocks = _answered(side_by_side(*map(_labelled, each, chosen)))
    del each
    for place in places:
        yield place, blocks.pop(0)


def _alone(tensor: SteppedTensor, part: Tensor, how: Any) -> Tensor:
    """What one tensor gets of what it wants, whatever the others want."""
    if callable(how):
        whole: Any = how(tensor.gather(part))
        return tensor.scatter(whole)
    return tensor.total(part, how)


def _labelled(stages: Stages[T], tensor: SteppedTensor) -> Generator[Any, list[Tensor], T]:
    """The same, each sum with the tensor that it is of."""
    try:
        wanted = next(stages)
        while True:
            wanted = stages.send((yield [(part, axis, tensor.whole) for part, axis in wanted]))
    except StopIteration as end:
        return end.value


def _answered(stages: Generator[Any, list[Tensor], T]) -> T:
    """What it ends with, its sums added up over ranks stage by stage."""
    try:
        wanted = next(stages)
        while True:
            answers: dict[int, Tensor] = {}
            for answer, asks in ((add_over_ranks, False), (each_on_one_rank, True)):
                chosen = [i for i, one in enumerate(wanted) if callable(one[1]) is asks]
                parts, how, wholes = ([wanted[i][k] for i in chosen] for k in range(3))
                answers |= zip(chosen, answer(parts, wholes, how), strict=True)
            wanted = stages.send([answers[i] for i in range(len(wanted))])
    except StopIteration as end:
        return end.value


def _packs(tensors: Sequence[SteppedTensor]) -> Iterator[list[int]]:
    places: list[int] = []
    size = 0
    for place, tensor in enumerate(tensors):
        own = shard_elements(tensor.whole)
        if places and size + own > HELD:
            yield places
            places, size = [], 0
        places, size = [*places, place], size + own
    if places:
        yield places
