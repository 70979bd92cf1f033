"""What ranks do for the tests of scale: one of eight that are not there, and four that are."""

import contextlib
import itertools
import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

import cruxy_torch as ours
from cruxy_control.slices import blocks

SHAPES = [(64, 32), (32, 64), (63, 31), (64, 32), (32,), (64,), (31,)]
"""Matrices first; of some the shards are uneven."""
LAYOUT = blocks(8, 12, 12, axis=1)
ROWS = blocks(16, 24, 24, axis=0)


def _directed(direction):
    return lambda ps: ours.CruxyOptimizer(ps, direction=direction)


def _sliced(direction):
    return lambda ps: ours.CruxyOptimizer([ps[0]], direction=direction)


def _muon(ps):
    groups = [{"params": ps[:4], "role": "mlp.up"}, {"params": ps[4:], "role": "norm"}]
    return ours.CruxyOptimizer(groups, mode="self_driving", direction="muon")


def _everything(ps):
    inner = ours.AdaptiveGradientClip(ours.SignBlend(), 0.1)
    return ours.CruxyOptimizer(ps, direction=ours.TrustRatio(ours.ClipRms(inner), decay=0.9))


OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, 0),
    "cruxy": (ours.CruxyOptimizer, 1),
    "lion": (lambda ps: ours.CruxyOptimizer(ps, use_lion=True), 1),
    "low bit": (lambda ps: ours.CruxyOptimizer(ps, state_bits=8), 1),
    "self_driving": (lambda ps: ours.CruxyOptimizer(ps, mode="self_driving"), 2),
    "axiom": (ours.AXIOM, 4),
    "axiom_all": (lambda ps: ours.AXIOM(ps, momentum=0.9, relative_step=True, snr_floor=0.1), 5),
    "cosmic": (lambda ps: ours.Cosmic(ps, state_budget="15KB"), 2),
    "tiger": (ours.Tiger, 2),
    "blend": (_directed(ours.SignBlend()), 2),
    "trust": (_directed(ours.TrustRatio(ours.SignBlend(), decay=0.9)), 3),
    "trust of rows": (_directed(ours.TrustRatio(ours.SignBlend(), per="row")), 3),
    "agc": (_directed(ours.AdaptiveGradientClip(ours.SignBlend())), 3),
    "clip_rms": (_directed(ours.ClipRms(ours.SignBlend(), 1.0)), 3),
    "lora_pid": (_directed(ours.BlendByLoraPid()), 5),
    "all": (_everything, 5),
    "balance": (_sliced(ours.BalanceSlices(ours.SignBlend(), LAYOUT, every=1)), 3),
    "slices": (_sliced(ours.ScaleSlices(ours.SignBlend(), LAYOUT, {"k": 0.5})), 2),
    "slices of rows": (_sliced(ours.ScaleSlices(ours.SignBlend(), ROWS, {"k": 0.5})), 2),
    "balance of rows": (_sliced(ours.BalanceSlices(ours.SignBlend(), ROWS, every=1)), 3),
    "muon": (_muon, 2),
}
"""Maker, and how many packed sums wait for one another along each axis of the mesh."""

ALONE = {"cosmic": lambda ps: ours.Cosmic(ps, state_budget="60KB")}
"""Maker on one process where it is another: a budget is that of a rank, and the plan of tiers is
the same where a fourth of the tensors has a fourth of it."""


def cut_twice(value, mesh):
    """This rank's rows after tensor parallelism along the last axis and `fully_shard` along all."""
    for size, place in zip(reversed(mesh.shape), reversed(mesh.get_coordinate()), strict=True):
        parts = value.chunk(size)
        value = parts[place] if place < len(parts) else value[:0]
    return value


TRAINED = [name for name in OPTIMIZERS if name not in ("adamw", "low bit")]
"""What is held to one process: blocks of codes are those of a shard."""


def placed(mesh, twice=False):
    """Parameters, and gradients of a step; matrices along both axes, vectors on all ranks.

    Args:
        mesh: of two axes.
        twice: rows of all of them along both axes instead, the last axis first.
    """
    generator = torch.Generator().manual_seed(0)
    both, copies = [Shard(0), Shard(1)][: mesh.ndim], [Replicate()] * mesh.ndim

    def place(shape):
        value = torch.randn(shape, generator=generator)
        if not twice:
            return distribute_tensor(value, mesh, both if len(shape) > 1 else copies)
        own = cut_twice(value, mesh).clone()
        rows = [_StridedShard(0, split_factor=mesh.size(1)), Shard(0)]
        return DTensor.from_local(
            own, mesh, rows, run_check=False, shape=value.shape, stride=value.stride()
        )

    return [torch.nn.Parameter(place(s)) for s in SHAPES], lambda: [place(s) for s in SHAPES]


def alone():
    """The same of one process."""
    generator = torch.Generator().manual_seed(0)

    def values():
        return [torch.randn(shape, generator=generator) for shape in SHAPES]

    return list(map(torch.nn.Parameter, values())), values


STACKS = {
    "layers": ((6, 16, 24), [Shard(1), Shard(2)], {"role": "mlp.up", "stacked": True}),
    "experts": ((5, 24, 16), [Shard(1), Replicate()], {"role": "moe.expert.up"}),
    "layers of experts": (
        (3, 2, 16, 8),
        [Shard(0), Shard(2)],
        {"role": "moe.expert.down", "stacked": True},
    ),
    "kernels": ((5, 8, 4, 3, 3), [Shard(1), Shard(0)], {"role": "conv", "stacked": True}),
    "whole": ((2, 4, 8, 8), [Shard(0), Shard(1)], {"role": "moe.expert.gate", "stacked": True}),
}
"""Shape, placements and group of stacks of matrices; those of the last are whole on their rank."""


def stacks(mesh, names, whole=False):
    """Muon for stacks of matrices, and its parameters and gradients; of one process if `whole`."""
    generator = torch.Generator().manual_seed(0)

    def place(name):
        shape, placements, _ = STACKS[name]
        value = torch.randn(shape, generator=generator)
        return value if whole else distribute_tensor(value, mesh, placements)

    params = [torch.nn.Parameter(place(name)) for name in names]
    groups = [{"params": [p], **STACKS[name][2]} for p, name in zip(params, names, strict=True)]
    optimizer = ours.CruxyOptimizer(groups, mode="self_driving", direction="muon")
    return optimizer, params, lambda: [place(name) for name in names]


@contextlib.contextmanager
def received():
    """How many elements this rank gets in each message to all."""
    seen, plain = [], dist.all_to_all_single

    def counting(output, *rest, **options):
        seen.append(output.numel())
        return plain(output, *rest, **options)

    dist.all_to_all_single = counting
    try:
        yield seen
    finally:
        dist.all_to_all_single = plain


def train(optimizer, params, gradients, steps=3):
    for _ in range(steps):
        for p, g in zip(params, gradients(), strict=True):
            p.grad = g
        optimizer.step(loss=1.0)


def count():
    """The collectives of a step of every optimizer, by name."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    mesh = dist.init_device_mesh("cpu", (4, 2), mesh_dim_names=("data", "model"))
    seen = {}
    for twice, (name, (make, _)) in itertools.product((False, True), OPTIMIZERS.items()):
        params, gradients = placed(mesh, twice)
        optimizer = make(params)
        for _ in range(2):
            for p, g in zip(params, gradients(), strict=True):
                p.grad = g
            with CommDebugMode() as counted:
                optimizer.step(**({} if name == "adamw" else {"loss": 1.0}))
        case = f"{name} twice" if twice else name
        seen[case] = {str(op): n for op, n in counted.get_comm_counts().items()}
    for name in STACKS:
        with received() as seen[name]:
            train(*stacks(mesh, [name]), steps=1)
    return seen


def join(rank, folder):
    """Makes this process one of four ranks."""
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4)


def run(rank, folder, twice, names):
    """Optimizers on a mesh of two by two, against one process; leaves the differences."""
    join(rank, folder)
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    seen = {}
    for name in names:
        make, _ = OPTIMIZERS[name]
        params, gradients = placed(mesh, twice)
        train(make(params), params, gradients)
        whole, same = alone()
        train(ALONE.get(name, make)(whole), whole, same)
        found = [p.to_local() if twice else p.full_tensor() for p in params]
        wanted = [cut_twice(q, mesh) if twice else q for q in whole]
        seen[name] = max((p - q).abs().max().item() for p, q in zip(found, wanted, strict=True))
    torch.save(seen, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def spread(rank, folder):
    """Stacks on a mesh of two by two, against one process; leaves what came, and differences."""
    join(rank, folder)
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    seen = {}
    for names in (*([name] for name in STACKS), list(STACKS)):
        optimizer, params, gradients = stacks(mesh, names)
        with received() as came:
            train(optimizer, params, gradients, steps=1)
        train(optimizer, params, gradients, steps=2)
        optimizer, alone, gradients = stacks(mesh, names, whole=True)
        train(optimizer, alone, gradients)
        pairs = zip(params, alone, strict=True)
        off = max((p.full_tensor() - q).abs().max().item() for p, q in pairs)
        seen[" and ".join(names)] = came, off
    torch.save(seen, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


BITS = (32, 16, 8, 4)
RESUMED = {
    "meta3": lambda ps, bits: ours.CruxyOptimizer(ps, state_bits=bits),
    "lion": lambda ps, bits: ours.CruxyOptimizer(ps, use_lion=True, state_bits=bits),
    "self_driving": lambda ps, bits: ours.CruxyOptimizer(ps, mode="self_driving", state_bits=bits),
    "axiom": lambda ps, bits: ours.AXIOM(ps, momentum=0.9, momentum_bits=bits),
    "cosmic": lambda ps, bits: ours.Cosmic(ps, state_budget="60KB", state_bits=bits),
    "tiger": lambda ps, bits: ours.Tiger(ps, state_bits=bits),
}
FAST = (("self_driving", 32), ("axiom", 32))
"""What the fast tests resume; the others are slow."""


class Bag(torch.nn.Module):
    """Parameters and nothing else."""

    def __init__(self, params):
        super().__init__()
        self.values = torch.nn.ParameterList(params)


def _saved_and_loaded(make, folder, first, second):
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    params, gradients = placed(first)
    net, optimizer = Bag(params), make(params)
    train(optimizer, params, gradients, steps=2)
    model, state = get_state_dict(net, optimizer)
    save({"model": model, "optimizer": state}, checkpoint_id=folder)
    others, same = placed(second)
    for _ in range(2):
        same()  # the gradients of the steps before
    other, loaded = Bag(others), make(others)
    model, state = get_state_dict(other, loaded)
    kept = {"model": model, "optimizer": state}
    load(kept, checkpoint_id=folder)
    set_state_dict(
        other, loaded, model_state_dict=kept["model"], optim_state_dict=kept["optimizer"]
    )
    train(optimizer, params, gradients, steps=1)
    train(loaded, others, same, steps=1)
    pairs = zip(params, others, strict=True)
    return max((p.full_tensor() - q.full_tensor()).abs().max().item() for p, q in pairs)


def resume(rank, folder, cases):
    """Runs on a mesh of two by two that go on, on one of one by four; leaves the differences."""
    join(rank, folder)
    meshes = [dist.init_device_mesh("cpu", shape) for shape in ((2, 2), (1, 4))]
    seen = {}
    for name, bits in cases:

        def make(ps, name=name, bits=bits):
            return RESUMED[name](ps, bits)

        try:
            difference = _saved_and_loaded(make, f"{folder}/{name}-{bits}", *meshes)
        except Exception as error:  # the test says which
            difference = f"{type(error).__name__}: {error}"
        seen[f"{name}-{bits}"] = difference
    torch.save(seen, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(count()))
