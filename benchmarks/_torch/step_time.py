"""Times of PyTorch steps, every optimizer in one interleaved run.

Gradients of an optimizer's step are the same every time and stay where they are. On a GPU each step
is waited for.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from benchmarks._measured_optimizers import REFERENCE
from benchmarks._shapes import Shapes
from benchmarks._timing import interleave, summary
from benchmarks._torch.device import DEVICE
from benchmarks._torch.measured_optimizers import OPTIMIZERS, step_of, training_step
from benchmarks.workloads import load
from cruxy_torch import state_bytes


class Alone:
    """One optimizer on parameters of its own.

    Args:
        make: from a model to the optimizer.
        shapes: of the parameters.
    """

    def __init__(self, make: Callable[[nn.Module], Optimizer], shapes: Shapes) -> None:
        draw = torch.Generator(DEVICE).manual_seed(0)

        def normal(shape: tuple[int, ...], scale: float) -> torch.Tensor:
            return scale * torch.randn(shape, device=DEVICE, generator=draw)

        self.params = [nn.Parameter(normal(shape, 0.02)) for shape in shapes.values()]
        for param in self.params:
            param.grad = normal(tuple(param.shape), 0.001)
        self.optimizer = make(nn.ParameterList(self.params))
        self.step = functools.partial(step_of(self.optimizer), torch.tensor(1.0, device=DEVICE))
        self.step()  # the first step makes the state, and may compile

    @property
    def state_bytes_per_parameter(self) -> float:
        """Bytes of all that the optimizer keeps, over the number of parameters."""
        return state_bytes(self.optimizer) / sum(p.numel() for p in self.params)


def optimizer_steps(
    shapes: Shapes, repeats: int, names: Sequence[str], console: Console
) -> dict[str, dict[str, Any]]:
    """Times of the optimizers alone.

    Args:
        shapes: of the parameters.
        repeats: interleaved rounds that count.
        names: keys of `OPTIMIZERS`, the reference among them.
        console: where progress is shown.
    """
    steps = {name: Alone(OPTIMIZERS[name].make, shapes) for name in names}
    rows = summarized({name: alone.step for name, alone in steps.items()}, repeats, console)
    for name, alone in steps.items():
        rows[name]["state_bytes_per_parameter"] = alone.state_bytes_per_parameter
    return rows


def training_steps(
    name: str, data: str | None, repeats: int, names: Sequence[str], console: Console
) -> dict[str, dict[str, Any]]:
    """Times of whole training steps: batch to the device, forward, backward and optimizer.

    Args:
        name: of the workload, which is trained on its first batch over and over.
        data: its text file, if it is not the usual one.
        repeats: interleaved rounds that count.
        names: keys of `OPTIMIZERS`, the reference among them.
        console: where progress is shown.
    """
    workload = load(name, data, "torch")
    batch = next(workload.batches(0))
    steps = {}
    for optimizer in names:
        model = workload.init(0)
        train = training_step(workload, model, OPTIMIZERS[optimizer].make(model))
        steps[optimizer] = functools.partial(train, batch)
        steps[optimizer]()
    return summarized(steps, repeats, console)


def summarized(
    steps: Mapping[str, Callable[[], Any]], repeats: int, console: Console
) -> dict[str, dict[str, Any]]:
    """Interleaved times by name, with the optimizer's label."""
    candidates = {name: functools.partial(_seconds, step) for name, step in steps.items()}
    rows = summary(interleave(candidates, repeats, console), REFERENCE)
    return {name: {"label": OPTIMIZERS[name].label, **row} for name, row in rows.items()}


def _seconds(step: Callable[[], Any]) -> float:
    """Of one step, waited for."""
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
