"""What the two processes of the distributed tests do; each returns what it saw."""

import copy
import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from cruxy_torch import CruxyOptimizer

STEPS = 6
OPTIONS = {"adam": {}, "lion": {"use_lion": True, "lr": 1e-3, "use_gc": True}}


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5), torch.nn.LayerNorm(5)
    )


def data(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 7, generator=generator)
    return x, x[:, :5].sin()


def loss_of(net, x, y):
    return ((net(x) - y) ** 2).mean()


def optimizer(net, name, **more):
    return CruxyOptimizer(net.parameters(), **{"lr": 1e-2, **OPTIONS[name], **more})


def alone(name, steps=STEPS):
    """The same training in one process, on the whole batch."""
    net = network()
    opt = optimizer(net, name)
    for step in range(steps):
        opt.zero_grad()
        loss = loss_of(net, *data(step))
        loss.backward()
        opt.step(loss=loss if step != 3 else None)
    return parameters(net), memory(opt)


def shared(net, opt, start=0, steps=STEPS):
    """Training on this rank's half of each batch; at step 2 only rank 0 has a loss, at 3 none."""
    rank = dist.get_rank()
    for step in range(start, start + steps):
        x, y = data(step)
        opt.zero_grad()
        loss = loss_of(net, x[rank::2], y[rank::2])
        loss.backward()
        mine = loss.detach().clone()
        if step == 2:
            dist.all_reduce(mine)
            mine /= 2
        absent = step == 3 or (step == 2 and rank == 1)
        opt.step(loss=None if absent else mine)


def parameters(net):
    return {
        name.removeprefix("module."): whole(p).detach().clone()
        for name, p in net.named_parameters()
    }


def memory(opt):
    return {k: v.clone() for k, v in opt.param_groups[0]["controller"].items() if k != "report"}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def ddp(name):
    net = DistributedDataParallel(network())
    opt = optimizer(net, name, process_group=dist.group.WORLD)
    shared(net, opt)
    return {"ours": (parameters(net), memory(opt)), "alone": alone(name)}


def sharded(name):
    net = network()
    for layer in (net[0], net[2]):
        fully_shard(layer)
    fully_shard(net)
    return net, optimizer(net, name)


def fsdp(name):
    net, opt = sharded(name)
    shared(net, opt)
    return {"ours": (parameters(net), memory(opt)), "alone": alone(name)}


def bad_shard(name):
    net, opt = sharded(name)
    shared(net, opt, steps=2)
    before = parameters(net), memory(opt)
    loss = loss_of(net, *data(2))
    opt.zero_grad()
    loss.backward()
    if dist.get_rank() == 1:
        gradient: Any = next(net[2].parameters()).grad
        gradient.to_local()[0, 0] = float("nan")
    opt.step(loss=loss)
    return {"before": before, "after": (parameters(net), memory(opt))}


def checkpoint(name, flat):
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    path = os.path.join(folders[0], "checkpoint")
    net, opt = sharded(name)
    shared(net, opt, steps=4)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model_state, opt_state = get_state_dict(net, opt, options=options)
    save({"model": model_state, "opt": opt_state}, checkpoint_id=path)
    shared(net, opt, start=4, steps=3)

    other, other_opt = sharded(name)
    model_state, opt_state = get_state_dict(other, other_opt, options=options)
    state = {"model": model_state, "opt": opt_state}
    load(state, checkpoint_id=path)
    set_state_dict(
        other,
        other_opt,
        model_state_dict=state["model"],
        optim_state_dict=state["opt"],
        options=options,
    )
    shared(other, other_opt, start=4, steps=3)
    return {
        "ours": (parameters(other), memory(other_opt)),
        "theirs": (parameters(net), memory(opt)),
    }


def full_state(name):
    """A gathered state goes to one process and back."""
    net, opt = sharded(name)
    shared(net, opt, steps=4)
    options = StateDictOptions(full_state_dict=True)
    saved = copy.deepcopy(get_optimizer_state_dict(net, opt, options=options))
    values = parameters(net)
    shared(net, opt, start=4, steps=3)

    other, other_opt = sharded(name)
    with torch.no_grad():
        p: Any
        for key, p in other.named_parameters():
            p.copy_(distribute_tensor(values[key], p.device_mesh, p.placements))
    set_optimizer_state_dict(other, other_opt, saved, options=options)
    shared(other, other_opt, start=4, steps=3)
    return {
        "ours": (parameters(other), memory(other_opt)),
        "theirs": (parameters(net), memory(opt)),
    }


CASES = {
    f"{case.__name__}-{'-'.join(map(str, arguments))}": (case, arguments)
    for case, arguments in [
        *((case, (name,)) for case in (ddp, fsdp, bad_shard, full_state) for name in OPTIONS),
        *((checkpoint, (name, flat)) for name in OPTIONS for flat in (False, True)),
    ]
}


def run(rank, folder):
    """Everything, in one process of two; leaves `rank<n>.pt` in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for key, (case, arguments) in CASES.items():
        results[key] = case(*arguments)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
