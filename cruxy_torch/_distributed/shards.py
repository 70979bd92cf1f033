"""All that knows a `DTensor`: this rank's shard, sums over shards, and tensors sharded like others.

Nothing here imports that subsystem for those who use none.
"""

import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


_PLAIN = {Tensor, torch.nn.Parameter}


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether it is a `DTensor`."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


def any_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether one of them is a `DTensor`."""
    return not _PLAIN.issuperset(map(type, tensors)) and any(map(is_sharded, tensors))


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a `DTensor`, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def drop_gathered(tensors: Iterable[Tensor]) -> None:
    """Has `fully_shard` gather anew what it holds of a forward pass, since shards change.

    A root module keeps whole parameters after a forward pass that no backward pass followed, and
    its next one takes these. Whoever writes shards outside of a step calls this. Nothing leads
    from a shard to its module, so every module in the process lets go, at the cost of gathering
    once more; no message is sent.

    Args:
        tensors: those that are written; where none is sharded, nothing is done.

    Raises:
        RuntimeError: where torch does not say which modules there are.
    """
    if not any_sharded(tuple(tensors)):
        return
    try:
        from torch.distributed._composable_state import _module_state_mapping
    except ImportError as error:
        raise RuntimeError(
            "the modules under fully_shard must be known before sharded parameters are written, "
            f"got torch {torch.__version__}, which does not list them; use torch 2.4 to 2.13."
        ) from error
    for module in tuple(_module_state_mapping):
        # By name, since the class lies elsewhere before torch 2.6.
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            module.reshard()  # pyright: ignore[reportCallIssue]


def in_processes() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def launched_ranks() -> int:
    """How many processes train together, or were started by torchrun to do so."""
    if in_processes():
        return dist.get_world_size()
    launched = dist.is_available() and dist.is_torchelastic_launched()
    return int(os.environ.get("WORLD_SIZE", "1")) if launched else 1


def is_first_rank() -> bool:
    """Whether this process is the one that writes files."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def is_split(placement: Any, axis: int | None = None) -> bool:
    """Whether a placement splits a tensor, along this axis if one is given.

    `fully_shard` after tensor parallelism along the same axis has a placement of its own, whose
    `is_shard` is false from torch 2.13 on.
    """
    splits = placement.is_shard() or hasattr(placement, "split_factor")
    return splits and axis in (None, placement.dim)


def rows_are_whole(tensor: Tensor) -> bool:
    """Whether each rank holds whole rows, all axes but the first."""
    return not is_sharded(tensor) or all(
        is_split(placement, 0) or not is_split(placement) for placement in tensor.placements
    )


def placed_like(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient as its parameter is placed: partial sums are added up, shards cut alike."""
    if not is_sharded(grad) or not is_sharded(param) or grad.placements == param.placements:
        return grad
    return grad.redistribute(param.device_mesh, param.placements)


def over_ranks(total: Tensor, whole: Tensor, axis: int | None = None) -> Tensor:
    """A sum over this rank's part of `whole`, added up over the ranks that split it.

    Args:
        total: the sum.
        whole: a `DTensor`, or a plain tensor, which nobody splits.
        axis: the axis that was summed over, the others kept; `None` for all.
    """
    if not is_sharded(whole):
        return total
    for dimension, placement in enumerate(whole.placements):
        if is_split(placement, axis):
            total = total.contiguous()
            dist.all_reduce(total, group=whole.device_mesh.get_group(dimension))
    return total


def add_over_ranks(
    parts: Sequence[Tensor], wholes: Sequence[Tensor], axes: Sequence[int | None]
) -> list[Tensor]:
    """`over_ranks` of many sums, one all-reduce for each axis of a mesh and each dtype.

    Args:
        parts: the sums, of any shapes.
        wholes: see `over_ranks`, one for each.
        axes: likewise.
    """
    totals = list(parts)
    split: dict[Any, list[int]] = {}
    for index, (whole, axis) in enumerate(zip(wholes, axes, strict=True)):
        if is_sharded(whole):
            for dimension, placement in enumerate(whole.placements):
                if is_split(placement, axis):
                    key = (whole.device_mesh, dimension, parts[index].dtype)
                    split.setdefault(key, []).append(index)
    # Every rank goes through the axes of a mesh in one order, whatever comes first.
    for mesh, dimension, dtype in sorted(split, key=lambda key: (key[1], str(key[2]))):
        indices = split[mesh, dimension, dtype]
        packed = torch.cat([totals[i].reshape(-1) for i in indices])
        dist.all_reduce(packed, group=mesh.get_group(dimension))
        each = packed.split([totals[i].numel() for i in indices])
        for index, own in zip(indices, each, strict=True):
            totals[index] = own.reshape(totals[index].shape)
    return totals


def add_shards(values: Tensor, tensors: Sequence[Tensor]) -> None:
    """Adds up each value over the ranks that split its tensor, one all-reduce a mesh axis."""
    split: dict[tuple[Any, int], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if is_sharded(tensor):
            for axis, placement in enumerate(tensor.placements):
                if is_split(placement):
                    split.setdefault((tensor.device_mesh, axis), []).append(index)
    for (mesh, axis), indices in split.items():
        part = values[indices]
        dist.all_reduce(part, group=mesh.get_group(axis))
        values[indices] = part


def over_mesh(values: Tensor, mesh: Any) -> None:
    """Adds up values over all ranks of a mesh, in place."""
    for axis in range(mesh.ndim):
        dist.all_reduce(values, group=mesh.get_group(axis))


def by_mesh(grads: Sequence[Tensor]) -> tuple[list[int], dict[Any, dict[int, list[int]]]]:
    """Indices of plain tensors, and of shards by mesh and by how many ranks hold the same shard."""
    plain: list[int] = []
    sharded: dict[Any, dict[int, list[int]]] = {}
    for index, grad in enumerate(grads):
        if not is_sharded(grad):
            plain.append(index)
            continue
        copies = 1
        for axis, placement in enumerate(grad.placements):
            if placement.is_replicate():
                copies *= grad.device_mesh.size(axis)
        sharded.setdefault(grad.device_mesh, {}).setdefault(copies, []).append(index)
    return plain, sharded


def gathered(own: Tensor, whole: Tensor) -> Tensor:
    """All of a tensor that is split like `whole`, on every rank, from this rank's part of it."""
    if not is_sharded(whole):
        return own
    from torch.distributed.tensor import DTensor

    split = DTensor.from_local(
        own,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return split.full_tensor()


def own_part(full: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has all of, split like `whole`."""
    if not is_sharded(whole):
        return full
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * whole.device_mesh.ndim
    copies = DTensor.from_local(full, whole.device_mesh, everywhere, run_check=False)
    return copies.redistribute(whole.device_mesh, whole.placements).to_local()


def shard_elements(param: Tensor) -> int:
    """Elements of the largest shard."""
    shape = list(param.shape)
    if is_sharded(param):
        for axis, placement in enumerate(param.placements):
            if is_split(placement):
                dim: int = placement.dim  # pyright: ignore[reportAttributeAccessIssue]
                shape[dim] = math.ceil(shape[dim] / param.device_mesh.size(axis))
    return math.prod(shape)


def placed(own: Tensor, param: Tensor) -> Tensor:
    """One tensor over the parameter's mesh of which each rank holds its own rows."""
    if not is_sharded(param):
        return own
    from torch.distributed.tensor import DTensor, Shard

    placements = [p if p.is_replicate() else Shard(0) for p in param.placements]
    return DTensor.from_local(own, param.device_mesh, placements, run_check=False)


def zeros_without(param: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    """Zeros like a parameter of which one axis has a single element, which nobody splits."""
    shape = [1 if index == axis else size for index, size in enumerate(param.shape)]
    if not is_sharded(param):
        return torch.zeros(shape, dtype=dtype, device=param.device)
    from torch.distributed.tensor import DTensor, Replicate

    placements = [Replicate() if is_split(p, axis) else p for p in param.placements]
    part = param.to_local()
    own = [1 if index == axis else size for index, size in enumerate(part.shape)]
    stride = [math.prod(shape[index + 1 :]) for index in range(len(shape))]
    return DTensor.from_local(
        torch.zeros(own, dtype=dtype, device=part.device),
        param.device_mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(stride),
    )


def splits(tensor: "DTensor", axis: int) -> list[int] | None:
    """The axes of its mesh that an axis of the tensor is split along, in the order of the splits.

    `fully_shard` splits what tensor parallelism has split before along a later axis of the mesh:
    its placement says into how many parts. `None` where no order explains it.
    """
    order: list[int] = []
    for dimension in reversed(range(tensor.device_mesh.ndim)):
        placement = tensor.placements[dimension]
        if not is_split(placement, axis):
            continue
        before = getattr(placement, "split_factor", 1)
        for place in range(len(order) + 1):
            if math.prod(tensor.device_mesh.size(d) for d in order[:place]) == before:
                order.insert(place, dimension)
                break
        else:
            return None
    return order


def shard_span(
    tensor: "DTensor", axis: int, place: Sequence[int], order: Sequence[int]
) -> tuple[int, int]:
    """Where the part at a place of the mesh begins and ends along an axis of the whole tensor.

    Args:
        tensor: of which it is a part.
        axis: of the tensor.
        place: coordinates of a rank in the tensor's mesh.
        order: see `splits`.
    """
    begin, size = 0, tensor.shape[axis]
    for dimension in order:
        each = math.ceil(size / tensor.device_mesh.size(dimension))
        start = min(each * place[dimension], size)
        begin, size = begin + start, min(each, size - start)
    return begin, begin + size


def shard_begin(tensor: Tensor, axis: int) -> int:
    """Where along an axis of the whole tensor this rank's shard begins; 0 of a plain one.

    Raises:
        ValueError: where the ranks hold no even blocks of the axis.
    """
    if not is_sharded(tensor):
        return 0
    order = splits(tensor, axis)
    if order is None:
        raise ValueError(
            f"axis {axis} must be split into even blocks, got {tensor.placements}; slice a "
            "parameter that is split along another axis, or leave its slices out."
        )
    return shard_span(tensor, axis, tuple(tensor.device_mesh.get_coordinate() or ()), order)[0]
