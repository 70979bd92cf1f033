"""What the two processes of the sharded tests of AXIOM and COSMIC do."""

import os
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard

from cruxy_torch import AXIOM, Cosmic, state_bytes
from torch_workers import parameters, whole

STEPS = 6

OPTIMIZERS = {
    "axiom": lambda net: AXIOM(net.parameters(), lr=1e-2, relative_step=True),
    "axiom_weighed": lambda net: AXIOM(
        net.parameters(),
        lr=1e-2,
        momentum=0.9,
        momentum_bits=32,
        streak_boost=1.4,
        snr_floor=0.2,
    ),
    "cosmic_signs": lambda net: cosmic(net, BUDGETS["cosmic_signs"]),
    "cosmic": lambda net: cosmic(net, BUDGETS["cosmic"]),
}
"""Rows of odd numbers, so that shards differ in size and blocks would not fit."""

BUDGETS = {"cosmic_signs": 518, "cosmic": 18_000}


def cosmic(net, budget):
    return Cosmic(net.named_parameters(), lr=1e-2, state_budget=budget, retier_every=2)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(40, 65), torch.nn.Tanh(), torch.nn.Linear(65, 33), torch.nn.Linear(33, 5)
    )


def data(step):
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(step))
    return x, x[:, :5].sin()


def train(net, opt, start=0, steps=STEPS, share=slice(None)):
    for step in range(start, start + steps):
        x, y = data(step)
        opt.zero_grad()
        loss = ((net(x[share]) - y[share]) ** 2).mean()
        loss.backward()
        opt.step(loss=loss)


def sharded(name):
    net = network()
    for layer in net:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer)
    fully_shard(net)
    return net, OPTIMIZERS[name](net)


def alone(name):
    net = network()
    # A budget is a rank's; one process with all of every tensor needs more for the same plan.
    opt = cosmic(net, 30_000) if name == "cosmic" else OPTIMIZERS[name](net)
    train(net, opt)
    return parameters(net)


def state_of(opt):
    return {
        f"{i}.{key}": whole(value).clone()
        for i, state in enumerate(opt.state.values())
        for key, value in state.items()
    }


def run(rank, folder):
    """Everything, in one process of two; leaves `rank<n>.pt` in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    share = slice(rank, None, 2)
    results = {}
    for name in OPTIMIZERS:
        net, opt = sharded(name)
        train(net, opt, share=share)
        results[name] = {
            "ours": parameters(net),
            "alone": alone(name),
            "tiers": opt.tiers() if isinstance(opt, Cosmic) else {},
            "bytes": state_bytes(opt),
        }
    for name in ("axiom", "axiom_weighed"):
        results[f"resumed_{name}"] = resumed(name, share)
        results[f"released_{name}"] = released(name, share)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def released(name, share):
    net, opt = sharded(name)
    opt.register_hooks()
    train(net, opt, share=share)
    return all(p.grad is None for p in net.parameters()), parameters(net)


def resumed(name, share):
    """The parameters and state of a run, and of one that went on from its checkpoint."""
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    path = os.path.join(folders[0], "checkpoint")
    net, opt = sharded(name)
    train(net, opt, steps=3, share=share)
    model_state, opt_state = get_state_dict(net, opt)
    save({"model": model_state, "opt": opt_state}, checkpoint_id=path)
    train(net, opt, start=3, steps=3, share=share)

    other, other_opt = sharded(name)
    model_state, opt_state = get_state_dict(other, other_opt)
    state = {"model": model_state, "opt": opt_state}
    load(state, checkpoint_id=path)
    set_state_dict(other, other_opt, model_state_dict=state["model"], optim_state_dict=state["opt"])
    train(other, other_opt, start=3, steps=3, share=share)
    return {
        "ours": parameters(other) | state_of(other_opt),
        "theirs": parameters(net) | state_of(opt),
    }
