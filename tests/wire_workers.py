"""What the four processes of the wire tests do; each returns what it saw."""

import contextlib
import copy
import math
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import cruxy_torch
from cruxy_torch import CruxyOptimizer
from cruxy_torch._distributed.messages import GATHER

RANKS = 4
STEPS = 8
LONG = 100


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 300), nn.Tanh(), nn.Linear(300, 65), nn.LayerNorm(65))


def batch(step, rank):
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(100 * step + rank))
    return x, x.sin().repeat(1, 3)[:, :65]


def parameters(net):
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


class Counted:
    """Bytes of messages that the collectives are handed, counted where they are called.

    Of what a rank hands over, its own part stays with it.
    """

    def __init__(self):
        self.bytes = 0

    def _wrapped(self, name, share):
        call = getattr(dist, name)

        def counting(output, given, *args, group=None, **kwargs):
            if given.dtype == torch.uint8:  # parameters that `fully_shard` gathers are of float32
                self.bytes += round(given.numel() * share(dist.get_world_size(group)))
            return call(output, given, *args, group=group, **kwargs)

        return call, counting

    @contextlib.contextmanager
    def here(self):
        shares = {
            "all_to_all_single": lambda n: (n - 1) / n,
            GATHER: lambda n: n - 1,
        }
        kept = {}
        for name, share in shares.items():
            kept[name], counting = self._wrapped(name, share)
            setattr(dist, name, counting)
        try:
            yield self
        finally:
            for name, call in kept.items():
                setattr(dist, name, call)


def train(net, optimizer, start=0, steps=STEPS, bad=None):
    """Training on this rank's batches; at the step `bad` the first rank's gradient is NaN."""
    rank = dist.get_rank()
    for step in range(start, start + steps):
        x, y = batch(step, rank)
        if step == bad and rank == 0:
            x = x * math.nan
        optimizer.zero_grad()
        loss = ((net(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step(loss=loss.detach() if step != bad else None)
    return loss.detach()


def replicated(bits=None, vote=False, **options):
    net = DistributedDataParallel(network(), bucket_cap_mb=0.02)
    state = None
    if bits:
        state = cruxy_torch.CompressedAllReduce(bits)
        net.register_comm_hook(state, cruxy_torch.compressed_allreduce_hook)
    if vote:
        net.register_comm_hook(None, cruxy_torch.local_gradients_hook)
        options |= {"use_lion": True, "vote": dist.group.WORLD, "lr": 1e-3}
    else:
        options |= {"process_group": dist.group.WORLD}
    return net, CruxyOptimizer(net.parameters(), **{"lr": 3e-3, **options}), state


def sharded(bits=None):
    net = network()
    for layer in (net[0], net[2]):
        fully_shard(layer)
    fully_shard(net)
    wire = cruxy_torch.compress_fsdp(net, bits) if bits else None
    return net, CruxyOptimizer(net.parameters(), lr=3e-3), wire


def made(kind):
    if kind == "vote":
        return replicated(vote=True)
    place, bits = kind.split("-")
    return (replicated if place == "ddp" else sharded)(int(bits))


def trained(kind):
    """Bytes on the way, a bad step at the end, and what all ranks have then."""
    net, optimizer, wire = made(kind)
    before = parameters(net).clone()
    with Counted().here() as counted:
        train(net, optimizer)
    after = parameters(net).clone()
    sent = wire.bytes_sent if wire else counted.bytes
    uncompressed = wire.bytes_uncompressed if wire else 0
    train(net, optimizer, start=STEPS, steps=1, bad=STEPS)
    return {
        "before": before,
        "after": after,
        "skipped": optimizer.telemetry()["skipped_total"],
        "unmoved": torch.equal(parameters(net), after),
        "telemetry": optimizer.telemetry(),
        "counted": counted.bytes,
        "sent": sent,
        "uncompressed": uncompressed,
    }


def resumed(kind):
    """Half of a run, saved by each rank, and the other half in new objects."""
    net, optimizer, _ = made(kind)
    train(net, optimizer)
    want = parameters(net)
    net, optimizer, wire = made(kind)
    train(net, optimizer, steps=STEPS // 2)
    saved = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
    saved |= {"wire": wire.state_dict()} if wire else {}
    fresh, again, wire = made(kind)
    fresh.load_state_dict(saved["net"])
    again.load_state_dict(saved["optimizer"])
    if wire:
        wire.load_state_dict(saved["wire"])
    train(fresh, again, start=STEPS // 2, steps=STEPS - STEPS // 2)
    return {"same": torch.equal(parameters(fresh), want)}


def pair():
    """A group of the first two ranks; all ranks have to ask for it."""
    return dist.new_group([0, 1])


def merged():
    """A run of four ranks that two go on with, in 32 and in 8 bits, and all four again."""
    found, two = {}, pair()
    for bits in (32, 8):
        net, optimizer, _ = replicated(vote=True, state_bits=bits)
        train(net, optimizer)
        states = [None] * RANKS
        dist.all_gather_object(states, optimizer.state_dict())
        state = cruxy_torch.merge_votes(states)
        found[bits] = {"states": states, "merged": state}
        if dist.get_rank() < 2:
            small = network()
            small.load_state_dict(net.module.state_dict())
            fewer = CruxyOptimizer(
                small.parameters(), use_lion=True, vote=two, lr=1e-3, state_bits=bits
            )
            try:
                fewer.load_state_dict(states[dist.get_rank()])
            except ValueError as error:
                found[bits]["error"] = str(error)
            fewer.load_state_dict(state)
            found[bits]["begun"] = copy.deepcopy(fewer.state_dict()["state"])
            found[bits]["before"] = parameters(small)
            train(small, fewer, start=STEPS)
            found[bits]["after"] = parameters(small)
            found[bits]["saved"] = fewer.state_dict()["param_groups"][0]["direction"]
            found[bits]["steps"] = fewer.telemetry()["step"]
        dist.barrier()
        optimizer.load_state_dict(state)
        train(net, optimizer, start=STEPS, steps=2)
        found[bits]["all"] = parameters(net)
    return found


def averages(bits):
    """200 compressed means of the same gradients, by the hook and by the reduce-scatter."""
    rank = dist.get_rank()
    own = torch.randn(3, 700, generator=torch.Generator().manual_seed(rank))
    draws = {"ddp": [], "fsdp": []}
    net = nn.ParameterDict({"w": nn.Parameter(torch.zeros(3, 700))})

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net

        def forward(self, x):
            return (self.inner["w"] * x).sum()

    model = DistributedDataParallel(Product())
    model.register_comm_hook(
        cruxy_torch.CompressedAllReduce(bits), cruxy_torch.compressed_allreduce_hook
    )
    wire = cruxy_torch.CompressedReduceScatter(bits, 0)
    for _ in range(200):
        model.zero_grad()
        model(own).backward()
        draws["ddp"].append(net["w"].grad.flatten().clone())
        part = torch.empty(2100 // RANKS)
        wire(part, own.flatten(), dist.group.WORLD, dist.ReduceOp.AVG)
        draws["fsdp"].append(part)
    return {name: torch.stack(each) for name, each in draws.items()} | {"own": own.flatten()}


def voted():
    """One step from momenta and gradients that are known, next to NumPy's majority."""
    rank = dist.get_rank()
    param = nn.Parameter(torch.zeros(37, 53))
    optimizer = CruxyOptimizer(
        [param], lr=1.0, use_lion=True, vote=dist.group.WORLD, weight_decay=0.0
    )
    grads = []
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + rank)
        grad = torch.randn(37, 53, generator=generator)
        grad[:, :5] = 0.0  # nobody says anything
        grad[:, 5:20] = grad[:, 5:20].abs() * (1.0 if rank % 2 else -1.0)  # two against two
        param.grad = grad
        before = param.detach().clone()
        optimizer.step()
        grads.append(grad)
    momentum = optimizer.state[param]["exp_avg"].clone()
    moved = before - param.detach()
    return {
        "grads": torch.stack(grads),
        "momentum": momentum,
        "moved": moved,
        "telemetry": optimizer.telemetry(),
    }


def refused():
    net, optimizer, _ = replicated(vote=True)
    train(net, optimizer, steps=1)
    states = [None] * RANKS
    dist.all_gather_object(states, optimizer.state_dict())
    errors = []
    try:
        optimizer.load_state_dict(states[(dist.get_rank() + 1) % RANKS])
    except ValueError as error:
        errors.append(str(error))
    net, _, _ = sharded()
    try:
        CruxyOptimizer(net.parameters(), use_lion=True, vote=dist.group.WORLD)
    except ValueError as error:
        errors.append(str(error))
    try:
        CruxyOptimizer(network().parameters(), vote=dist.group.WORLD)
    except ValueError as error:
        errors.append(str(error))
    double = DistributedDataParallel(network().double())
    double.register_comm_hook(
        cruxy_torch.CompressedAllReduce(8), cruxy_torch.compressed_allreduce_hook
    )
    try:
        double(torch.ones(2, 32, dtype=torch.float64)).sum().backward()
    except (ValueError, RuntimeError) as error:
        errors.append(str(error))
    try:
        cruxy_torch.Trainer(network(), [])
    except ValueError as error:
        errors.append(str(error))
    return {"errors": errors}


def top_k():
    rank = dist.get_rank()
    wire = cruxy_torch.AXIOM_DDP(n=1000, top_k_percent=6.25)
    own = torch.randn(1000, generator=torch.Generator().manual_seed(rank))
    payload = wire.compress(own)
    mean = wire.mean(payload)
    indices = payload.indices.clone()
    dist.all_reduce(indices)
    error = ""
    try:
        wire.decompress(payload.values, indices, payload.count)
    except ValueError as raised:
        error = str(raised)
    return {
        "own": own,
        "payload": tuple(payload),
        "nbytes": payload.nbytes,
        "mean": mean,
        "error": error,
    }


def long(kind):
    net, optimizer, _ = made(kind)
    first = train(net, optimizer, steps=1)
    last = train(net, optimizer, start=1, steps=LONG - 1)
    return {"after": parameters(net).clone(), "first": first, "last": last}


KINDS = ["ddp-8", "ddp-4", "fsdp-8", "fsdp-4", "vote"]
FAST = (
    {f"trained-{kind}": lambda kind=kind: trained(kind) for kind in KINDS}
    | {"averages-4": lambda: averages(4)}
    | {"voted": voted, "refused": refused, "top_k": top_k, "merged": merged}
    | {f"resumed-{kind}": lambda kind=kind: resumed(kind) for kind in ("ddp-8", "vote")}
)
SLOW = (
    {f"long-{kind}": lambda kind=kind: long(kind) for kind in KINDS}
    | {f"resumed-{kind}": lambda kind=kind: resumed(kind) for kind in ("ddp-4", "fsdp-8", "fsdp-4")}
    | {"averages-8": lambda: averages(8)}
)


def run(rank, folder, slow):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    os.environ["CRUXY_TORCH_BACKEND"] = "auto"
    cases = SLOW if slow else FAST
    torch.save({name: case() for name, case in cases.items()}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
