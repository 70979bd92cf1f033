"""Whole tensors out of shards, each on one rank of a mesh: what a direction of a matrix needs."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_torch._distributed.shards import gathered, is_sharded, own_part

Function = Callable[[Tensor], Tensor]


def each_on_one_rank(
    parts: Sequence[Tensor], wholes: Sequence[Tensor], functions: Sequence[Function]
) -> list[Tensor]:
    """This rank's parts of `f(x)` for tensors `x`, each computed by one rank of its mesh.

    As many tensors go at a time as the mesh has ranks. Each rank gets the parts of one of them,
    computes it and sends every other rank its part: two messages to all.

    Args:
        parts: this rank's part of each tensor.
        wholes: a `DTensor` of the same placements, or a plain tensor, which all ranks compute.
        functions: what is made of each, in its shape and dtype.
    """
    results = list(parts)
    together: dict[tuple[Any, torch.dtype], list[int]] = {}
    for index, (part, whole) in enumerate(zip(parts, wholes, strict=True)):
        mesh = whole.device_mesh if is_sharded(whole) else None
        if mesh is None or not _divides(whole) or _group(mesh) is None:
            results[index] = own_part(functions[index](gathered(part, whole)), whole)
        else:
            together.setdefault((mesh, part.dtype), []).append(index)
    for (mesh, _), indices in together.items():
        for begin in range(0, len(indices), mesh.size()):
            few = indices[begin : begin + mesh.size()]
            own = _in_one_round(
                mesh, [parts[i] for i in few], [wholes[i] for i in few], [functions[i] for i in few]
            )
            for index, result in zip(few, own, strict=True):
                results[index] = result
    return results


def _in_one_round(
    mesh: Any, parts: list[Tensor], wholes: list[Any], functions: list[Function]
) -> list[Tensor]:
    """As many tensors as the mesh has ranks, or fewer; the first goes to the first rank."""
    places = list(itertools.product(*map(range, mesh.shape)))
    me = places.index(tuple(mesh.get_coordinate()))
    count = len(parts)
    cuts = [[_cut(whole, place) for place in places] for whole in wholes]

    def sends(tensor: int, rank: int) -> bool:
        """Whether a rank sends its part of a tensor: one of those that hold the same."""
        return all(
            placement.is_shard() or mine == owners
            for placement, mine, owners in zip(
                wholes[tensor].placements, places[rank], places[tensor], strict=True
            )
        )

    def size(tensor: int, rank: int) -> int:
        return math.prod(piece.stop - piece.start for piece in cuts[tensor][rank])

    ranks = range(len(places))
    out = [size(t, me) if t < count and sends(t, me) else 0 for t in ranks]
    back = [size(me, r) if me < count and sends(me, r) else 0 for r in ranks]
    mine = [part.reshape(-1) for t, part in enumerate(parts) if out[t]]
    got = _exchanged(mesh, mine, parts[0], out, back)
    answer: list[Tensor] = []
    if me < count:
        full = parts[me].new_empty(wholes[me].shape)
        for rank, piece in zip(ranks, got.split(back), strict=True):
            if back[rank]:
                full[cuts[me][rank]] = piece.view(full[cuts[me][rank]].shape)
        del got
        found = functions[me](full)
        answer = [found[cuts[me][rank]].reshape(-1) for rank in ranks]
    out = [size(me, r) if me < count else 0 for r in ranks]
    back = [size(t, me) if t < count else 0 for t in ranks]
    each = _exchanged(mesh, answer, parts[0], out, back).split(back)
    return [own.view(part.shape) for own, part in zip(each, parts, strict=False)]


def _exchanged(
    mesh: Any, pieces: Sequence[Tensor], like: Tensor, out: list[int], back: list[int]
) -> Tensor:
    packed = torch.cat(list(pieces)) if pieces else like.new_empty(0)
    received = like.new_empty(sum(back))
    dist.all_to_all_single(received, packed, back, out, group=_group(mesh))
    return received


def _cut(whole: Any, place: tuple[int, ...]) -> tuple[slice, ...]:
    """The part of a tensor that is at a place of its mesh."""
    spans = [(0, size) for size in whole.shape]
    for dimension, placement in enumerate(whole.placements):
        if placement.is_shard():
            begin, size = spans[placement.dim]
            each = math.ceil(size / whole.device_mesh.size(dimension))
            start = min(each * place[dimension], size)
            spans[placement.dim] = (begin + start, min(each, size - start))
    return tuple(slice(begin, begin + size) for begin, size in spans)


def _divides(whole: Any) -> bool:
    """Whether its parts are even blocks in the order of its mesh, and there are several."""
    placements = whole.placements
    strided = any(hasattr(placement, "split_factor") for placement in placements)
    return any(placement.is_shard() for placement in placements) and not strided


def _group(mesh: Any) -> Any:
    """The ranks of a mesh as one group; `None` where a mesh of several axes has no names."""
    if mesh.ndim == 1:
        return mesh.get_group(0)
    if mesh.size() == dist.get_world_size() and mesh.mesh.flatten().tolist() == list(
        range(mesh.size())
    ):
        return dist.group.WORLD
    return mesh._flatten().get_group() if mesh.mesh_dim_names else None
