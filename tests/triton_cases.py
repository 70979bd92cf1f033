"""What the tests of the Triton path share: the device, orders, and tensors of every form."""

import os

import pytest
import torch

from cruxy_torch._actuators.apply import group_of
from cruxy_torch._actuators.moments import Adam, Lion
from cruxy_torch._actuators.stepped import Frame
from cruxy_torch._memory.state import add_moment, numbered
from cruxy_torch._orders import Orders
from torch_low_bit import parameters

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

needs_a_place_to_run = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU, or TRITON_INTERPRET=1"
)
needs_a_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = ((96, 77), (5, 1200), (70,), (), (0, 3), (4096,))


def orders(**changed):
    """Orders as tensors on the device."""
    numbers = {"rate": 1e-2, "beta1": 0.875, "beta2": 0.99, "scale": 0.7, "average_weight": 0.3}
    key = torch.tensor(changed.pop("key", 12345), dtype=torch.int32, device=DEVICE)
    ok = torch.tensor(changed.pop("ok", True), device=DEVICE)
    limits = changed.pop("limits", None)
    scalars = {
        name: torch.tensor(value, dtype=torch.float32, device=DEVICE)
        for name, value in (numbers | changed).items()
    }
    return Orders(**scalars, ok=ok, key=key, limits=limits)


def group(
    *, bits=32, dtype=torch.float32, lion=False, chance=False, averaged=False, shapes=SHAPES,
    decay=0.1, coupled=False, seed=0, nesterov=True,
):  # fmt: skip
    """A parameter group with gradients of many magnitudes and moments of values."""
    params = [p.detach().to(DEVICE) for p in parameters(*shapes, dtype=dtype, seed=seed)]
    direction = Lion() if lion else Adam(1e-8, nesterov)
    generator = torch.Generator().manual_seed(seed + 1)
    grads, states = [], []
    for p in params:
        state = {}
        for name in direction.moments:
            add_moment(state, name, p, torch.float32, bits if p.numel() >= 4096 else 32)
        for name in direction.clocks:
            state[name] = torch.ones((), dtype=torch.float32, device=DEVICE)
        if averaged:
            state["average"] = torch.randn(p.shape, generator=generator).to(DEVICE)
        x = torch.randn(p.shape, generator=generator)
        x = (x * torch.randn(p.shape, generator=generator).exp()).to(DEVICE, dtype)
        grads.append(x)
        states.append(state)
    numbers = list(numbered(params).values())
    options = {
        "lr": 0.1, "maximize": False, "averaging": 1.0 if averaged else None,
        "relative_limit": None,
    }  # fmt: skip
    return group_of(
        0, options, (params, grads, states, numbers), direction, Frame(decay, coupled=coupled),
        bits=bits, stochastic=chance,
    )  # fmt: skip


def everything(group):
    """Parameters and state of a group by name, copied."""
    found = {}
    for i, (p, state) in enumerate(zip(group.params, group.columns.states, strict=True)):
        found |= {f"{i}.param": p.clone()}
        found |= {f"{i}.{name}": value.clone() for name, value in state.items()}
    return found


def ulps(ours, theirs):
    """The largest difference in units of the last place of the larger of both."""
    if not ours.numel():
        return 0.0
    dtype = ours.dtype
    if not dtype.is_floating_point:
        return 0.0 if torch.equal(ours, theirs) else float("inf")
    larger = torch.maximum(ours.abs(), theirs.abs()).double()
    unit = torch.finfo(dtype).eps * 2.0 ** larger.clamp(min=1e-37).log2().floor()
    return ((ours.double() - theirs.double()).abs() / unit).max().item()
