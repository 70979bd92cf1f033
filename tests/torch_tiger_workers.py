"""What the two processes of the tests of sharded directions do; each returns what it saw."""

import os

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

from cruxy_control.slices import blocks
from cruxy_torch import (
    BalanceSlices,
    BlendByLoraPid,
    CruxyOptimizer,
    ScaleSlices,
    SignBlend,
    TrustRatio,
)
from cruxy_torch._actuators.moments import Lion
from test_torch_tiger_directions import DIRECTIONS
from torch_released import OFF

SHAPES = ((91, 64), (33,))
LAYOUTS = {0: blocks(47, 22, 22), 1: blocks(30, 18, 16, axis=1)}
"""By the axis that they lie along; neither ends where shards do."""


def directions(axis):
    """By name, for parameters that are split along an axis."""
    own = {"lora": BlendByLoraPid(), **DIRECTIONS}
    if axis:
        del own["rms of blocks"]  # blocks are those of a shard
    for along, layout in LAYOUTS.items():
        own |= {
            f"slices along {along}": ScaleSlices(SignBlend(), layout, {"q": 0.5, "k": 0.0}),
            f"balance along {along}": BalanceSlices(SignBlend(), layout, every=1),
            f"trust along {along}": TrustRatio(Lion(), decay=0.9, per="slice", slices=layout),
        }
    return own


NAMES = [f"{name}, split along {axis}" for axis in (0, 1) for name in directions(axis)]


def steps(direction, place):
    """What parameters, of which `place` makes each of a plain one, become in a few steps."""
    generator = torch.Generator().manual_seed(0)
    of_axes = getattr(direction, "slices", None) or getattr(direction, "per", "") == "block"
    shapes = SHAPES[:1] if of_axes else SHAPES  # a vector has only the axis that is split
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    params = [torch.nn.Parameter(place(value)) for value in values]
    optimizer = CruxyOptimizer(params, lr=1e-2, law=OFF, direction=direction)
    for _ in range(4):
        for p, shape in zip(params, shapes, strict=True):
            p.grad = place(torch.randn(shape, generator=generator))
        optimizer.step(loss=1.0)
    return [p.detach() for p in params]


def run(rank, folder):
    """Every direction, whole and split along each axis."""
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    seen = {}
    for axis in (0, 1):

        def place(value, axis=axis):
            return distribute_tensor(value, mesh, [Shard(min(axis, value.ndim - 1))])

        for name, direction in directions(axis).items():
            split = [p.full_tensor() for p in steps(direction, place)]
            seen[f"{name}, split along {axis}"] = split, steps(direction, torch.clone)
    torch.save(seen, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
