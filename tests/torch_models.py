"""Small models, data and the table of option sets that the PyTorch tests run through."""

from typing import Any

import torch
from torch import nn

from cruxy_torch import CruxyOptimizer

OPTIONS: dict[str, dict[str, Any]] = {
    "meta3": {},
    "meta3_plain": {"use_nesterov": False, "weight_decay": 0.0},
    "meta3_l2": {"decoupled_weight_decay": False},
    "meta3_centralized": {"use_gc": True},
    "meta3_maximize": {"maximize": True},
    "meta3_gamma_1.7": {"gamma_norm": 1.7},
    "meta3_gamma_2": {"gamma_norm": 2.0},
    "meta_lion": {"use_lion": True, "lr": 1e-3, "betas": (0.9, 0.99)},
    "meta_lion_centralized": {"use_lion": True, "lr": 1e-3, "use_gc": True},
    "meta_lion_bfloat16": {"use_lion": True, "lr": 1e-3, "momentum_dtype": torch.bfloat16},
    "stability_v1": {"mode": "stability_v1"},
    "stability_v2": {"mode": "stability_v2"},
    "self_driving": {"mode": "self_driving"},
    "self_driving_lion": {"mode": "self_driving", "use_lion": True, "averaging": None},
    "limited": {"relative_limit": 0.01, "averaging": 0.0},
}
"""Every mode and option of the constructor that changes the mathematics."""


def model(dtype=torch.float32, seed=0):
    """A convolution, two linear layers, a 0-d and a zero-size parameter, by a seed of its own."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64, 16), nn.Tanh(),
        nn.Linear(16, 3),
    )  # fmt: skip
    net.register_parameter("temperature", nn.Parameter(torch.ones(())))
    net.register_parameter("empty", nn.Parameter(torch.zeros(0, 3)))
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return net.to(dtype)


def batch(step, dtype=torch.float32, size=8):
    """Images and targets of one step."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 1, 4, 4, generator=generator)
    return x.to(dtype), x.sum((1, 2))[:, :3].to(dtype)


def loss_of(net, x, y):
    return ((net(x) * net.temperature - y) ** 2).mean() + net.empty.sum()


def gradients(net):
    """The raw gradients themselves, in the order of the parameters."""
    return [p.grad for p in net.parameters() if p.grad is not None]


def spoil(net, value, index=2):
    """Puts `value` into one element of the gradient of one parameter."""
    gradients(net)[index].view(-1)[1] = value


def train(net, optimizer, steps, *, start=0, damage=None):
    """Trains and returns the losses; `damage(step, net)` may spoil the gradients."""
    losses = []
    for step in range(start, start + steps):
        x, y = batch(step, next(net.parameters()).dtype)
        optimizer.zero_grad()
        loss = loss_of(net, x, y)
        loss.backward()
        if damage is not None:
            damage(step, net)
        optimizer.step(loss=loss)
        losses.append(loss.item())
    return losses


def trained_with_and_without_scaler(network, optimizer):
    """Two copies of a network of one input width after six steps, the second under a scaler.

    The scale is a power of two, so that not a bit of a gradient may differ.
    """
    nets = [network(), network()]
    for net, scaled in zip(nets, (False, True), strict=True):
        opt = optimizer(net)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**12)
        for step in range(6):
            opt.zero_grad()
            x = torch.randn(16, net[0].in_features, generator=torch.Generator().manual_seed(step))
            loss = net(x).square().mean()
            scaler.scale(loss).backward()
            scaler.step(opt, loss=loss.detach())
            scaler.update()
    return nets


def optimizer(net, **options):
    return CruxyOptimizer(net.parameters(), **{"lr": 1e-2, **options})


def everything(net, optimizer):
    """Every tensor a good step may move and a bad one must not, by name; no report."""
    tensors = {f"param.{name}": p.detach().clone() for name, p in net.named_parameters()}
    for index, (_, state) in enumerate(optimizer.state.items()):
        tensors |= {f"{index}.{key}": value.clone() for key, value in state.items()}
    memory = optimizer.param_groups[0]["controller"]
    return tensors | {
        f"controller.{key}": value.clone() for key, value in memory.items() if key != "report"
    }


def assert_finite(tensors):
    """All finite, but that a law may order an infinite threshold, which clips nothing."""
    for name, value in tensors.items():
        fine = ~value.isnan() if name == "controller.controls" else value.isfinite()
        assert fine.all(), name


def assert_equal(ours, theirs, *, but=()):
    """Bit equality, NaN equal to NaN."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name not in but:
            assert torch.equal(torch.nan_to_num(ours[name]), torch.nan_to_num(theirs[name])), name
