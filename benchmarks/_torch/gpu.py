"""What is measured of PyTorch on a GPU: steps with their bytes, waits, graphs, trajectories.

All of it runs on the CPU too, where the figures say nothing, so that it can be tried.
"""

import collections
import functools
import gc
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
from cruxy_torch import CruxyOptimizer, state_bytes

CYCLES = 2e9
"""Of a GPU's clock in a second, about."""

MUON, TORCH_MUON = "muon", "torch-muon"
"""Timed beside the optimizers of the comparison: the orthogonal direction of every matrix, and
PyTorch's own, which leaves all else alone."""


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
    return {**_timed(lambda: target.copy_(source), repeats), "moved_bytes": 8 * elements}


def stepped(name: str, shapes: Shapes, repeats: int) -> dict[str, Any]:
    """The time of an optimizer's step, what it launches, and what our kernels move.

    Args:
        name: of the optimizer.
        shapes: of the parameters.
        repeats: steps that count.

    Raises:
        ValueError: where it cannot be made here.
    """
    params, label, step, optimizer = _ready(name, shapes)
    for _ in range(3):
        step()
    row: dict[str, Any] = {"label": label, **_timed(step, repeats)}
    found = counted(step)
    row["own_launches"], row["torch_calls"] = len(found.ours), len(found.torch)
    row["launches"] = _launches(step)
    row["moved_bytes"] = sum(launch.moved for launch in found.ours) or None
    count = sum(p.numel() for p in params)
    row["state_bytes_per_parameter"] = state_bytes(optimizer) / count
    taken = getattr(optimizer, "backend", None)
    row["backend"] = None if taken is None else dict(taken.tensors)
    return row


def started(name: str, shapes: Shapes) -> dict[str, Any]:
    """What the second step of an optimizer starts on a device, and what our kernels move.

    Args:
        name: see `stepped`.
        shapes: likewise.
    """
    params, label, step, _ = _ready(name, shapes)
    step()
    found = counted(step)
    return {
        "label": label,
        "kernels": dict(collections.Counter(launch.kernel for launch in found.ours)),
        "torch": dict(collections.Counter(found.torch)),
        "moved_words": sum(launch.moved for launch in found.ours) / 4,
        "parameters": sum(p.numel() for p in params),
        "tensors": len(params),
    }


def _ready(name: str, shapes: Shapes) -> tuple[list[nn.Parameter], str, Callable[[], Any], Any]:
    """Parameters with gradients, the optimizer's label, its step of a loss, and itself."""
    params = _parameters(shapes)
    optimizer, label = _made(name, params)
    loss = torch.ones((), dtype=torch.float32, device=DEVICE)
    return params, label, functools.partial(step_of(optimizer), loss), optimizer


def _made(name: str, params: list[nn.Parameter]) -> tuple[Any, str]:
    if name == MUON:
        of_axes = [[p for p in params if (p.ndim == 2) is matrix] for matrix in (True, False)]
        groups = [
            {"params": own, "role": role}
            for own, role in zip(of_axes, ("attention.q", "norm"), strict=True)
        ]
        return CruxyOptimizer(groups, direction="muon"), "Muon direction"
    if name == TORCH_MUON:
        muon = getattr(torch.optim, "Muon", None)
        if muon is None:
            raise ValueError("torch.optim.Muon needs PyTorch 2.9; leave it out.")
        return muon([p for p in params if p.ndim == 2]), "torch.optim.Muon, matrices alone"
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


def _timed(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Milliseconds on the device, and until the call returns; medians.

    The device is kept busy until all of a run is queued, so that it never waits for the host. Where
    a run has more launches than a queue holds, the host's time is in the device's.
    """
    seconds = [_host_seconds(run) for _ in range(repeats)]
    host = 1e3 * statistics.median(seconds)
    if DEVICE.type != "cuda":
        return {"milliseconds": host, "host_milliseconds": host}
    busy = int(CYCLES * min(1e-3 + 2.0 * max(seconds), 0.1))
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(busy)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return {"milliseconds": statistics.median(found), "host_milliseconds": host}


def _host_seconds(run: Callable[[], Any]) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _launches(step: Callable[[], Any]) -> int | None:
    """Kernels, copies and fills that a step starts; `None` without a GPU."""
    if DEVICE.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return sum(
        event.device_type.name == "CUDA" and not event.is_user_annotation
        for event in profile.events() or ()
    )


def waits(name: str, shapes: Shapes) -> dict[str, Any]:
    """Whether a step waits for the device, and whether it can be captured in a CUDA graph.

    Returns:
        `waits` and `captured`, `None` without a GPU, and the error where one failed.
    """
    if DEVICE.type != "cuda":
        return {"waits": None, "captured": None, "error": "no GPU"}
    _, _, step, _ = _ready(name, shapes)
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
        found["graph_milliseconds"] = _timed(graph.replay, 20)["milliseconds"]
    except RuntimeError as error:
        found |= {"captured": False, "error": str(error).splitlines()[0]}
    return found


def trajectory(
    name: str, shapes: Shapes, steps: int, decay: float, device: str = ""
) -> dict[str, Any]:
    """The parameters after steps on gradients that are the same everywhere.

    Args:
        name: of the optimizer.
        shapes: of the parameters.
        steps: how many.
        decay: of the weights.
        device: where; by default on the GPU where there is one.
    """
    where = torch.device(device) if device else DEVICE
    draw = np.random.default_rng(0)
    params = {
        key: nn.Parameter(torch.from_numpy(_drawn(draw, shape, 0.02)).to(where))
        for key, shape in shapes.items()
    }
    options = {
        "meta3": {"lr": 1e-3, "betas": (0.9, 0.999)},
        "meta_lion": {"lr": 1e-4, "betas": (0.9, 0.99), "use_lion": True},
        "self_driving": {"mode": "self_driving"},
    }
    optimizer = CruxyOptimizer(params.values(), weight_decay=decay, **options[name])
    for number in range(steps):
        for key, param in params.items():
            param.grad = torch.from_numpy(_drawn(draw, shapes[key], 0.01)).to(where)
        optimizer.step(loss=1.0 / (1 + number))
    return {key: param.detach().cpu().numpy() for key, param in params.items()}


def _drawn(draw: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    return (scale * draw.standard_normal(shape)).astype(np.float32)


def on_device(function: Callable[..., dict[str, Any]], *arrays: np.ndarray) -> dict[str, Any]:
    """What a function over an array namespace gives there, as NumPy's arrays."""
    there = [torch.from_numpy(np.asarray(array)).to(DEVICE) for array in arrays]
    return {name: value.cpu().numpy() for name, value in function(*there, xp=torch).items()}


def forget() -> None:
    """Gives memory that nothing uses back to the device."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
