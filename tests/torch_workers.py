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

from cruxy_torch import CruxyOptimizer, param_groups

STEPS = 6
OPTIONS = {
    "adam": {},
    "lion": {"use_lion": True, "lr": 1e-3, "use_gc": True},
    "self_driving": {"mode": "self_driving", "lr": 10.0},
    "muon": {"direction": "muon"},
}
LOW_BIT = {
    "adam8": {"state_bits": 8},
    "adam16": {"state_bits": 16},
    "lion4": {"use_lion": True, "lr": 1e-3, "state_bits": 4},
}
"""On a wider network, whose shards do not end where blocks of codes do."""
EVERY = OPTIONS | LOW_BIT
RELEASED = [name for name in EVERY if name != "self_driving"]
"""Its law cannot run on released gradients."""


def network(name="adam"):
    torch.manual_seed(0)
    width = 901 if name in LOW_BIT else 33
    return torch.nn.Sequential(
        torch.nn.Linear(7, width), torch.nn.Tanh(), torch.nn.Linear(width, 5), torch.nn.LayerNorm(5)
    )


def data(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 7, generator=generator)
    return x, x[:, :5].sin()


def loss_of(net, x, y):
    return ((net(x) - y) ** 2).mean()


def optimizer(net, name, **more):
    options = {"lr": 1e-2, **EVERY[name], **more}
    muon = options.get("direction") == "muon"
    params = param_groups(net, lr=options["lr"]) if muon else net.parameters()
    return CruxyOptimizer(params, **options)


def alone(name, steps=STEPS, release=False):
    """The same training in one process, on the whole batch."""
    net = network(name)
    opt = optimizer(net, name)
    if release:
        opt.register_hooks()
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


def sharded(name, **more):
    net = network(name)
    for layer in (net[0], net[2]):
        fully_shard(layer)
    fully_shard(net)
    return net, optimizer(net, name, **more)


def fsdp(name):
    net, opt = sharded(name)
    shared(net, opt)
    return {"ours": (parameters(net), memory(opt)), "alone": alone(name)}


def fsdp_low_bit(name):
    """Training, and what is kept of it on this rank."""
    net, opt = sharded(name)
    shared(net, opt)
    weight = net[0].weight
    return {
        "ours": (parameters(net), memory(opt)),
        "shapes": {key: tuple(value.shape) for key, value in opt.state[weight].items()},
        "local": {
            key: tuple(value.to_local().shape)
            for key, value in opt.state[weight].items()
            if hasattr(value, "to_local")
        },
    }


def fsdp_average(bits):
    """Averages after training, in float32 and in fewer bits, and where the codes lie."""
    found = []
    for each in (32, bits):
        net, opt = sharded("adam8", averaging=16.0, average_bits=each)
        shared(net, opt)
        with opt.averaged():
            found.append(parameters(net))
    codes = opt.state[net[0].weight]["average_codes"]
    local = tuple(codes.to_local().shape)
    return {"exact": found[0], "coded": found[1], "now": parameters(net), "local": local}


ALONE = {}
"""Training in one process with gradients released, which several processes refuse."""


def released(name):
    """Gradients are released in the backward pass; then one tensor's is bad on one rank."""
    net, opt = sharded(name)
    opt.register_hooks()
    shared(net, opt)
    ours = parameters(net), memory(opt)
    loss_of(net, *data(STEPS)).backward()
    left = sum(p.grad is not None for p in net.parameters())
    opt.step()
    before = parameters(net)
    p: Any
    for p in net.parameters():
        p.grad = torch.full_like(p, 0.01)
    if dist.get_rank() == 1:
        net[2].weight.grad.to_local()[0, 0] = float("nan")
    opt.step()
    return {
        "ours": ours,
        "alone": ALONE.get(name),
        "left": left,
        "before": before,
        "after": (parameters(net), memory(opt)),
    }


def ddp_released():
    """What `register_hooks` says where gradients are averaged after the hooks."""
    net = DistributedDataParallel(network())
    messages = []
    for options in ({"process_group": dist.group.WORLD}, {}):
        try:
            optimizer(net, "adam", **options).register_hooks()
        except ValueError as error:
            messages.append(str(error))
    return messages


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


def resharded(name):
    """The gathered state of two ranks does not fit one process, where blocks would be others."""
    net, opt = sharded(name)
    shared(net, opt, steps=1)
    options = StateDictOptions(full_state_dict=True)
    saved = get_optimizer_state_dict(net, opt, options=options)
    whole = network(name)
    other = optimizer(whole, name)
    names = {key: index for index, (key, _) in enumerate(whole.named_parameters())}
    state = other.state_dict()
    state["state"] = {names[key]: value for key, value in saved["state"].items()}
    state["param_groups"][0] |= {
        key: value for key, value in saved["param_groups"][0].items() if key != "params"
    }
    try:
        other.load_state_dict(state)
    except ValueError as error:
        return str(error)


CASES = {
    f"{case.__name__}-{'-'.join(map(str, arguments))}": (case, arguments)
    for case, arguments in [
        *((case, (name,)) for case in (ddp, fsdp) for name in OPTIONS),
        *((fsdp_low_bit, (name,)) for name in LOW_BIT),
        *((fsdp_average, (bits,)) for bits in (16, 8)),
        *((case, (name,)) for case in (bad_shard, full_state) for name in EVERY),
        *((released, (name,)) for name in RELEASED),
        *((checkpoint, (name, flat)) for name in EVERY for flat in (False, True)),
        (ddp_released, ()),
        *((resharded, (name,)) for name in ("adam8", "lion4")),
    ]
}


FAST = (
    *(key for key in CASES if not key.startswith(("full_state", "released", "checkpoint"))),
    *("full_state-self_driving", "full_state-adam8"),
    *("released-adam", "released-muon", "released-adam8"),
    *("checkpoint-adam-False", "checkpoint-self_driving-True", "checkpoint-lion4-False"),
    "checkpoint-muon-True",
)
"""The cases of the fast tests: of the long ones those that have no near relative among them."""
SLOW = tuple(key for key in CASES if key not in FAST)


def run(rank, folder, keys):
    """These cases, in one process of two; leaves `rank<n>.pt` in the folder."""
    torch.set_num_threads(1)
    names = [name for name in OPTIONS if f"released-{name}" in keys]
    ALONE.update({name: alone(name, release=True) for name in names})
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for key in keys:
        case, arguments = CASES[key]
        results[key] = case(*arguments)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
