"""What the tests of low-bit state and of bfloat16 parameters share."""

import torch

from cruxy_torch._native import library

PATHS = {"single": {"fused": False}, "foreach": {"foreach": True}}
if library.available():
    PATHS["native"] = {"fused": True}


def parameters(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return [torch.nn.Parameter(value.to(dtype)) for value in values]


def gradients(params, step, scale=1e-2):
    """Assigns gradients of many magnitudes."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        x = torch.randn(p.shape, generator=generator)
        p.grad = (scale * x * torch.randn(p.shape, generator=generator).exp()).to(p.dtype)


def train(params, optimizer, steps, *, start=0):
    for step in range(start, start + steps):
        gradients(params, step)
        optimizer.step(loss=1.0 / (1 + step))
    return optimizer


def state_of(optimizer):
    """Every tensor of the state, copied."""
    return [
        {key: value.clone() for key, value in optimizer.state[p].items()}
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert value.dtype == other[key].dtype
            assert torch.equal(value, other[key]), key
