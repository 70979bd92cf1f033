"""Whole matrices out of shards, each on one rank of a mesh: what a direction of a matrix needs."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_torch._distributed.shards import (
    gathered,
    is_sharded,
    is_split,
    own_part,
    shard_span,
    splits,
)

Cut = tuple[slice, ...]

STACKED, STACKED_ON_CPU = 1 << 24, 1 << 18
"""Elements of plain tensors that are computed together, at most: on a CPU only the smallest are
quicker so."""


class OfMatrices(NamedTuple):
    """A function of a tensor that is one of each of its matrices.

    Attributes:
        function: of any number of them, in their shape and dtype, and of how many axes count them.
        axes: how many of the first axes count matrices; 0 where the tensor is one.
    """

    function: Callable[[Tensor, int], Tensor]
    axes: int

    def __call__(self, matrices: Tensor) -> Tensor:
        """What is made of them."""
        return self.function(matrices, self.axes)

    def of_like(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """What is made of several tensors of one shape, at once."""
        if len(tensors) == 1:
            return [self(tensors[0])]
        return self.function(torch.stack(list(tensors)), self.axes + 1).unbind()


class _Matrix(NamedTuple):
    """One matrix of a tensor.

    Attributes:
        part: this rank's, without elements where it has none.
        result: what becomes of it, to be written.
        whole: the tensor.
        orders: of each of its axes, see `splits`.
        function: of its matrices.
        at: the matrix's place along the axes that count.
    """

    part: Tensor
    result: Tensor
    whole: Any
    orders: list[list[int]]
    function: OfMatrices
    at: tuple[int, ...]

    def cut(self, place: tuple[int, ...]) -> Cut | None:
        """The part of it that is at a place of its mesh; `None` for none."""
        cut = _cut(self.whole, self.orders, place)
        return cut[len(self.at) :] if _holds(cut, self.at) else None

    def computed(self, matrix: Tensor) -> Tensor:
        """What is made of it, from all of it."""
        return self.function(matrix.view(*[1] * len(self.at), *matrix.shape)).view(matrix.shape)


def each_on_one_rank(
    parts: Sequence[Tensor], wholes: Sequence[Any], functions: Sequence[OfMatrices]
) -> list[Tensor]:
    """This rank's parts of `f(x)` for tensors `x`, each matrix computed by one rank of its mesh.

    As many matrices go at a time as the mesh has ranks, those of a stack like separate ones. Each
    rank gets the parts of one of them, computes it and sends every other rank its part: two
    messages to all. Where every rank has whole matrices that no other has, nothing is sent. Plain
    tensors of one shape are computed together.

    Args:
        parts: this rank's part of each tensor.
        wholes: a `DTensor` of the same placements, or a plain tensor, which all ranks compute.
        functions: what is made of each.
    """
    results = list(parts)
    together: dict[tuple[Any, torch.dtype], list[_Matrix]] = {}
    plain: dict[int, tuple[Any, ...]] = {}
    for index, (part, whole, f) in enumerate(zip(parts, wholes, functions, strict=True)):
        mesh = whole.device_mesh if is_sharded(whole) else None
        orders = None if mesh is None else _orders(whole)
        if mesh is None:
            plain[index] = part.shape, part.device, part.dtype, f
        elif _stay(whole, f.axes):
            results[index] = f(part)
        elif orders is None or _group(mesh) is None:
            results[index] = own_part(f(gathered(part, whole)), whole)
        else:
            results[index] = part.new_empty(part.shape)
            matrices = _matrices(part, results[index], whole, orders, f)
            together.setdefault((mesh, part.dtype), []).extend(matrices)
    for some in stacks(plain):
        for index, found in zip(
            some, functions[some[0]].of_like([parts[i] for i in some]), strict=True
        ):
            results[index] = found
    for (mesh, _), matrices in together.items():
        for begin in range(0, len(matrices), mesh.size()):
            _in_one_round(mesh, matrices[begin : begin + mesh.size()])
    return results


def stacks(kinds: Mapping[int, tuple[Any, ...]]) -> Iterator[list[int]]:
    """The numbers of tensors of one kind, no more at a time than are computed together.

    Args:
        kinds: of each tensor by its number: its shape, its device, and what else is to be alike.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for number, kind in kinds.items():
        alike.setdefault(kind, []).append(number)
    for (shape, device, *_), numbers in alike.items():
        most = STACKED_ON_CPU if device.type == "cpu" else STACKED
        count = max(1, most // max(1, shape.numel()))
        for begin in range(0, len(numbers), count):
            yield numbers[begin : begin + count]


def _matrices(
    part: Tensor, result: Tensor, whole: Any, orders: list[list[int]], f: OfMatrices
) -> Iterator[_Matrix]:
    cut = _cut(whole, orders, tuple(whole.device_mesh.get_coordinate()))
    for at in itertools.product(*map(range, whole.shape[: f.axes])):
        if _holds(cut, at):
            own = tuple(i - piece.start for i, piece in zip(at, cut, strict=False))
            yield _Matrix(part[own], result[own], whole, orders, f, at)
        else:
            yield _Matrix(part.new_empty(0), part.new_empty(0), whole, orders, f, at)


def _in_one_round(mesh: Any, matrices: list[_Matrix]) -> None:
    """As many matrices as the mesh has ranks, or fewer; the first goes to the first rank."""
    places = list(itertools.product(*map(range, mesh.shape)))
    ranks = range(len(places))
    me = places.index(tuple(mesh.get_coordinate()))
    mine = matrices[me] if me < len(matrices) else None
    cuts = [None if mine is None else mine.cut(place) for place in places]

    def sends(number: int, rank: int) -> bool:
        """Whether a rank sends its part of a matrix: one of those that hold the same."""
        return all(
            is_split(placement) or here == owners
            for placement, here, owners in zip(
                matrices[number].whole.placements, places[rank], places[number], strict=True
            )
        )

    theirs = [matrix.part.numel() for matrix in matrices] + [0] * (len(places) - len(matrices))
    sizes = [0 if cut is None else math.prod(p.stop - p.start for p in cut) for cut in cuts]
    out = [theirs[number] if theirs[number] and sends(number, me) else 0 for number in ranks]
    back = [sizes[rank] if sizes[rank] and sends(me, rank) else 0 for rank in ranks]
    pieces = [matrix.part.reshape(-1) for matrix, own in zip(matrices, out, strict=False) if own]
    like = matrices[0].part
    got = _exchanged(mesh, pieces, like, out, back)
    answer: list[Tensor] = []
    if mine is not None:
        full = like.new_empty(mine.whole.shape[len(mine.at) :])
        for cut, piece in zip(cuts, got.split(back), strict=True):
            if cut is not None and piece.numel():
                full[cut] = piece.view(full[cut].shape)
        del got
        found = mine.computed(full)
        answer = [found[cut].reshape(-1) for cut in cuts if cut is not None]
    each = _exchanged(mesh, answer, like, sizes, theirs).split(theirs)
    for matrix, own in zip(matrices, each, strict=False):
        matrix.result.copy_(own.view(matrix.result.shape))


def _exchanged(
    mesh: Any, pieces: Sequence[Tensor], like: Tensor, out: list[int], back: list[int]
) -> Tensor:
    packed = torch.cat(list(pieces)) if pieces else like.new_empty(0)
    received = like.new_empty(sum(back))
    dist.all_to_all_single(received, packed, back, out, group=_group(mesh))
    return received


def _holds(cut: Cut, at: tuple[int, ...]) -> bool:
    """Whether a part of a tensor has some of the matrix at a place along its first axes."""
    return all(piece.start <= i < piece.stop for i, piece in zip(at, cut, strict=False))


def _cut(whole: Any, orders: list[list[int]], place: tuple[int, ...]) -> Cut:
    """The part of a tensor that is at a place of its mesh."""
    spans = (shard_span(whole, axis, place, order) for axis, order in enumerate(orders))
    return tuple(slice(*span) for span in spans)


def _stay(whole: Any, axes: int) -> bool:
    """Whether every rank has whole matrices, which so many axes count, that no other rank has."""
    return all(is_split(placement) and placement.dim < axes for placement in whole.placements)


def _orders(whole: Any) -> list[list[int]] | None:
    """In which order each axis was split; `None` where nothing is, or not into even blocks."""
    found = [splits(whole, axis) for axis in range(whole.ndim)]
    orders = [order for order in found if order is not None]
    return orders if any(orders) and len(orders) == len(found) else None


def _group(mesh: Any) -> Any:
    """The ranks of a mesh as one group; `None` where a mesh of several axes has no names."""
    if mesh.ndim == 1:
        return mesh.get_group(0)
    if mesh.size() == dist.get_world_size() and mesh.mesh.flatten().tolist() == list(
        range(mesh.size())
    ):
        return dist.group.WORLD
    return mesh._flatten().get_group() if mesh.mesh_dim_names else None
