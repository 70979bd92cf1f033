"""What is measured of PyTorch on a GPU: steps with their bytes, waits, graphs, trajectories.

All of it runs on the CPU too, where the figures say nothing, so that it can be tried.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks._shapes import Shapes
from benchmarks._torch.device import DEVICE
from benchmarks._torch.launches import counted
from benchmarks._torch.measured_optimizers import OPTIMIZERS, step_of
from cruxy_exact import BlockCode, stream_key
from cruxy_exact.random_bits import random_bits
from cruxy_torch import CruxyOptimizer, state_bytes

MUON = "muon"
"""Timed beside the optimizers of the comparison: the orthogonal direction of every matrix."""


def there() -> str:
    """Why nothing can be measured here; empty where there is a GPU."""
    if torch.cuda.is_available():
        return ""
    built = torch.version.cuda
    return (
        f"PyTorch {torch.__version__} finds no GPU ("
        + ("a build for the CPU" if built is None else f"built for CUDA {built}")
        + ")"
    )


def copied(elements: int, repeats: int) -> dict[str, Any]:
    """Bytes a second of a copy of so many float32 numbers, which are read and written."""
    source = torch.ones(elements, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    seconds = _median(lambda: target.copy_(source), repeats)
    return {"milliseconds": 1e3 * seconds, "moved_bytes": 8 * elements}


def stepped(name: str, shapes: Shapes, repeats: int) -> dict[str, Any]:
    """The time of an optimizer's step, what it launches, and what our kernels move.

    Args:
        name: of the optimizer.
        shapes: of the parameters.
        repeats: steps that count.

    Raises:
        ValueError: where it cannot be made here.
    """
    params = _parameters(shapes)
    optimizer, label = _made(name, params)
    loss = torch.ones((), dtype=torch.float32, device=DEVICE)
    step = functools.partial(step_of(optimizer), loss)
    for _ in range(3):
        step()
    row = {"label": label, "milliseconds": 1e3 * _median(step, repeats)}
    found = counted(step)
    row["own_launches"], row["torch_calls"] = len(found.ours), len(found.torch)
    row["launches"] = _launches(step)
    row["moved_bytes"] = sum(launch.moved for launch in found.ours) or None
    count = sum(p.numel() for p in params)
    row["state_bytes_per_parameter"] = state_bytes(optimizer) / count
    taken = getattr(optimizer, "backend", None)
    row["backend"] = None if taken is None else dict(taken.tensors)
    return row


def _made(name: str, params: list[nn.Parameter]) -> tuple[Any, str]:
    if name == "adamw-foreach":
        return torch.optim.AdamW(params, foreach=True, fused=False), "AdamW, foreach"
    if name == MUON:
        groups = [{"params": [p], "role": "attention.q" if p.ndim == 2 else "norm"} for p in params]
        return CruxyOptimizer(groups, direction="muon"), "Muon direction"
    entry = OPTIMIZERS[name]
    entry.check()
    return entry.make(nn.ParameterList(params)), entry.label


def _parameters(shapes: Shapes) -> list[nn.Parameter]:
    draw = torch.Generator(DEVICE).manual_seed(0)

    def normal(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return scale * torch.randn(shape, device=DEVICE, generator=draw, dtype=torch.float32)

    params = [nn.Parameter(normal(shape, 0.02)) for shape in shapes.values()]
    for param in params:
        param.grad = normal(tuple(param.shape), 0.001)
    return params


def _median(run: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _launches(step: Callable[[], Any]) -> int | None:
    """Kernels, copies and fills that a step starts; `None` without a GPU."""
    if DEVICE.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    events = profile.events() or ()
    return sum(1 for event in events if event.device_type.name == "CUDA")


def waits(name: str, shapes: Shapes) -> dict[str, Any]:
    """Whether a step waits for the device, and whether it can be captured in a CUDA graph.

    Returns:
        `waits` and `captured`, `None` without a GPU, and the error where one failed.
    """
    if DEVICE.type != "cuda":
        return {"waits": None, "captured": None, "error": "no GPU"}
    params = _parameters(shapes)
    optimizer, _ = _made(name, params)
    step = functools.partial(step_of(optimizer), torch.ones((), device=DEVICE))
    found: dict[str, Any] = {"waits": False, "captured": True, "error": ""}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        found |= {"waits": True, "error": str(error).splitlines()[0]}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
        found["graph_milliseconds"] = 1e3 * _median(graph.replay, 20)
    except RuntimeError as error:
        found |= {"captured": False, "error": str(error).splitlines()[0]}
    return found


def trajectory(name: str, shapes: Shapes, steps: int, device: str = "") -> dict[str, Any]:
    """The parameters after steps on gradients that are the same everywhere.

    Args:
        name: of the optimizer.
        shapes: of the parameters.
        steps: how many.
        device: where; by default on the GPU where there is one.
    """
    where = torch.device(device) if device else DEVICE
    draw = np.random.default_rng(0)
    params = {
        key: nn.Parameter(torch.from_numpy(_drawn(draw, shape, 0.02)).to(where))
        for key, shape in shapes.items()
    }
    options = {
        "meta3": {"lr": 1e-3},
        "meta_lion": {"lr": 1e-4, "use_lion": True, "betas": (0.9, 0.99)},
        "self_driving": {"mode": "self_driving"},
    }
    optimizer = CruxyOptimizer(params.values(), **options[name])
    for number in range(steps):
        for key, param in params.items():
            param.grad = torch.from_numpy(_drawn(draw, shapes[key], 0.01)).to(where)
        optimizer.step(loss=1.0 / (1 + number))
    return {key: param.detach().cpu().numpy() for key, param in params.items()}


def _drawn(draw: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    return (scale * draw.standard_normal(shape)).astype(np.float32)


def exact() -> dict[str, Any]:
    """Whether codes, scales and random bits on this device are those of NumPy, to the bit."""
    draw = np.random.default_rng(0)
    x = (draw.standard_normal((512, 256)) * np.exp(draw.standard_normal((512, 256)))).astype("f4")
    index = np.arange(x.size, dtype=np.int32).reshape(x.shape)
    there, found = torch.from_numpy(x).to(DEVICE), {}
    with np.errstate(over="ignore"):
        bits = random_bits(stream_key(np.int32(7), 0, 0, xp=np), index)
    same = random_bits(
        stream_key(torch.full((), 7, dtype=torch.int32, device=DEVICE), 0, 0, xp=torch),
        torch.from_numpy(index).to(DEVICE),
    )
    found["random bits"] = bool(np.array_equal(bits, same.cpu().numpy()))
    for width in (8, 4):
        for signed in (True, False):
            code, values = BlockCode(width, signed), x if signed else x * x
            scale = code.scale(np.abs(values).max(1), xp=np)[:, None]
            codes = code.encode(values, scale, code.noise(bits), xp=np)
            on_device = there if signed else there * there
            scales = code.scale(on_device.abs().amax(1), xp=torch)[:, None]
            own = code.encode(on_device, scales, code.noise(same), xp=torch)
            kind = f"{width} bits, {'signed' if signed else 'non-negative'}"
            found[kind] = bool(np.array_equal(codes, own.cpu().numpy()))
    return found


def forget() -> None:
    """Gives memory that nothing uses back to the device."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
