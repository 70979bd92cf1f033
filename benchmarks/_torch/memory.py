"""Bytes of PyTorch optimizers: state by its shapes, and the peak of training steps on a GPU."""

import itertools

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks._shapes import Shapes
from benchmarks._torch.measured_optimizers import OPTIMIZERS, training_step
from benchmarks.workloads import load
from cruxy_torch import estimate_memory


def state_bytes(name: str, shapes: Shapes) -> int:
    """Bytes of an optimizer's state, as its own first step makes it; nothing is allocated.

    Args:
        name: a key of `OPTIMIZERS`.
        shapes: of the parameters, which are float32.
    """
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes.values()]

    def make(params: list[nn.Parameter]) -> Optimizer:
        optimizer = OPTIMIZERS[name].make(nn.ParameterList(params))
        for group in optimizer.param_groups:
            if group.get("fused"):  # of which the meta device knows nothing; the state is the same
                group["fused"] = False
        return optimizer

    # torchao compiles its step, which the meta device cannot.
    with torch.compiler.set_stance("force_eager"):
        return estimate_memory(nn.ParameterList(params), make).state


def peak_bytes(name: str, trained: str, data: str | None) -> int | None:
    """The most that the third training step allocates; `None` where there is no GPU to tell.

    Args:
        name: a key of `OPTIMIZERS`.
        trained: the workload.
        data: its text file, if it is not the usual one.
    """
    if not torch.cuda.is_available():
        return None
    before = torch.cuda.memory_allocated()
    workload = load(trained, data, "torch")
    model = workload.init(0)
    train = training_step(workload, model, OPTIMIZERS[name].make(model))
    *first, last = itertools.islice(workload.batches(0), 3)
    for batch in first:
        train(batch)
    torch.cuda.reset_peak_memory_stats()
    train(last)
    return torch.cuda.max_memory_allocated() - before
