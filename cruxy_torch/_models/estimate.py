"""`estimate_memory`: what a run will keep, from a model, a name, a configuration, an optimizer."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from cruxy_control.memory import Model, adapter_count, loaded_bytes
from cruxy_control.tiers import parse_bytes
from cruxy_torch._memory.estimate import (
    MemoryEstimate,
    count_memory,
    nbytes,
    option_bytes,
    shared_parameters,
    state_to_come,
    stepped,
    tensor_bytes,
)
from cruxy_torch._models.skeleton import sizes_of, skeleton
from cruxy_torch._optimizers.axiom import AXIOM
from cruxy_torch._optimizers.cruxy import CruxyOptimizer

_RANK = 16


def estimate_memory(
    model: nn.Module | Optimizer | str | Path | Any,
    optimizer_factory: Callable[[list[nn.Parameter]], Optimizer] = AXIOM,
    *,
    device_memory: int | str | None = None,
) -> MemoryEstimate:
    """Counts what a model and its optimizer will keep, before anything is allocated.

    The state is what the optimizer itself makes: the factory is given parameters like the model's
    on the `meta` device, where tensors have shapes and no memory, and takes one step on them. It
    works for every optimizer of this package, of `torch.optim`, and any other whose first step
    allocates its state with torch's own operations and needs no closure (`LBFGS` does).

    Args:
        model: what is to be trained:

            - a module on any device, best on `meta` (`with torch.device("meta"): model = ...`); it
              is left as it is. Parameters sharded as `DTensor` count with this rank's shard.
            - a configuration of transformers, a folder with one, or a name on the hub: the model
              is made on `meta`, in bfloat16, and no weights are read.
            - an optimizer that exists: its parameters with the state that it has, or will have
              after its first step. `optimizer_factory` is not used then.
        optimizer_factory: makes the optimizer from the list of the parameters that are trained, in
            the order of `model.parameters()`; an optimizer's class will do. Leave out
            `fused=True`, which the `meta` device does not have; it does not change the state.
        device_memory: of the device to compare with, in bytes or as a text such as `"8GB"`; by
            default that of the current CUDA device, if there is one.

    Returns:
        The bytes by kind. `estimate["fp16_gb"]`, `["int8_gb"]` and `["int4_gb"]` are gigabytes of
        the weights as `load_model` holds them, and `["recommendation"]` the first way to train that
        fits the device.

    Raises:
        TypeError: where `model` is none of these, or the factory gives no optimizer, or one whose
            step needs a closure.
        ImportError: where a name or a configuration needs transformers, which is not installed.
        OSError: where there is no model of that name.

    Examples:
        >>> import torch
        >>> import cruxy_torch
        >>> with torch.device("meta"):
        ...     model = torch.nn.Linear(4096, 4096)
        >>> print(cruxy_torch.estimate_memory(model, torch.optim.AdamW))
        16,781,312 parameters             memory  bytes each
        parameters                     64.02 MiB      4.0000
        buffers                              0 B      0.0000
        gradients                      64.02 MiB      4.0000
          released                     64.00 MiB      3.9990
        optimizer state               128.03 MiB      8.0000
        total                         256.06 MiB     16.0000
          gradients released          256.05 MiB     15.9990
        >>> info = cruxy_torch.estimate_memory(model, device_memory="200MB")
        >>> info["fp16_gb"], info["int8_gb"]
        (0.033562624, 0.016805888)
        >>> print(info["recommendation"].partition(",")[0])
        AXIOM with released gradients
    """
    device_bytes = _device_bytes(device_memory)
    if isinstance(model, Optimizer):
        params = [p for group in model.param_groups for p in group["params"]]
        trained = [p for p in params if p.requires_grad]
        sizes = list(map(nbytes, trained))
        counted = MemoryEstimate(
            count=sum(p.numel() for p in params),
            parameters=sum(map(nbytes, params)),
            buffers=0,
            gradients=sum(sizes),
            released_gradients=max(sizes, default=0),
            state=state_to_come(model),
        )
        return counted.compared(Model(counted.count, ()), device_bytes, dict)
    if not isinstance(model, nn.Module):
        if isinstance(model, str | Path) or hasattr(model, "to_dict"):
            model = skeleton(model)
        else:
            raise TypeError(
                "model must be a module, an optimizer, a configuration of transformers, a folder "
                f"or a name, got {type(model).__name__}; give the model that is to be trained."
            )
    sizes = sizes_of(model)
    shapes = tuple((p.shape, p.requires_grad) for p in model.parameters())
    waiting = sum(p.numel() for p in shared_parameters(model) if p.requires_grad)
    ways = functools.partial(_ways, sizes, shapes, waiting)
    return count_memory(model, optimizer_factory).compared(sizes, device_bytes, ways)


def _device_bytes(device_memory: int | str | None) -> int | None:
    if device_memory is not None:
        return parse_bytes("device_memory", device_memory)
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return None


def _ways(sizes: Model, shapes: Sequence[tuple[torch.Size, bool]], waiting: int) -> dict[str, int]:
    """Bytes of the ways to train a model, from what trains best to what takes least.

    Args:
        sizes: of the model.
        shapes: of its parameters, and whether each is trained.
        waiting: elements of those whose gradients wait for several modules.
    """
    trained = [torch.empty(s, dtype=torch.bfloat16, device="meta") for s, grad in shapes if grad]
    moved = sum(t.numel() for t in trained)
    largest = min(2 * moved, 2 * waiting + max((nbytes(t) for t in trained), default=0))
    halves = loaded_bytes(sizes, 16)
    driving = functools.partial(CruxyOptimizer, mode="self_driving", state_bits=8)
    adapters = adapter_count(sizes, _RANK)
    ways = {
        "AdamW, float32": 2 * halves - sizes.buffers + 12 * moved,
        "CruxyOptimizer(mode='self_driving', state_bits=8), bfloat16": halves
        + 2 * moved
        + _state(trained, driving),
        "AXIOM with released gradients, bfloat16": halves + largest + _state(trained, AXIOM),
    }
    if adapters:
        # Adapters in float32, their gradients, and AdamW's two moments.
        name = f"load_model(bits=4, train='lora'), rank {_RANK}"
        ways[name] = loaded_bytes(sizes, 4) + 16 * adapters
    return ways


def _state(trained: list[torch.Tensor], factory: Callable[..., Optimizer]) -> int:
    """Bytes of the state of an optimizer of ours, where tensors of one shape take the same."""
    alike = Counter(t.shape for t in trained)
    if not alike:
        return 0
    one_each = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in alike]
    optimizer = stepped(one_each, factory)
    (group,) = optimizer.param_groups
    each = (tensor_bytes(optimizer.state[p]) * alike[p.shape] for p in group["params"])
    return option_bytes(optimizer) + sum(each)
