"""What a training run will keep in memory, counted before anything is allocated."""

import copy
import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from cruxy_control.memory import NAMES, Model, Sizes, read
from cruxy_torch._distributed.shards import local


@dataclasses.dataclass(frozen=True)
class MemoryEstimate(Sizes):
    """What one rank of a run keeps, in bytes; printed, a table.

    Activations, temporaries and what the allocator leaves unused come on top. Every attribute can
    also be read as `estimate["state"]`, and `dict(estimate)` has all of them.

    Attributes:
        count: elements of the parameters, those that are not trained included.
        parameters: bytes of the parameters.
        buffers: bytes of the model's buffers, such as running means.
        gradients: bytes of the gradients where all live together, as between `backward` and `step`.
        released_gradients: the most that is alive at once where each gradient is freed as soon as
            its parameter is updated: the largest of them, and those of parameters that several
            modules share, which wait for the last of these.
        state: bytes of the optimizer's state.
        model: what decides how much the weights take in few bits.
        device_bytes: of the device that the recommendation is for; `None` for none.
        find_ways: gives `ways`.
    """

    count: int
    parameters: int
    buffers: int
    gradients: int
    released_gradients: int
    state: int
    model: Model = dataclasses.field(default=Model(0, ()), repr=False)
    device_bytes: int | None = dataclasses.field(default=None, repr=False)
    find_ways: Callable[[], Mapping[str, int]] = dataclasses.field(
        default=dict, repr=False, compare=False
    )

    @functools.cached_property
    def ways(self) -> Mapping[str, int]:
        """Bytes of weights, gradients and state in each way to train, the best first."""
        return self.find_ways()

    def compared(
        self, model: Model, device_bytes: int | None, find_ways: Callable[[], Mapping[str, int]]
    ) -> "MemoryEstimate":
        """The same with what the weights in few bits and the recommendation need."""
        return dataclasses.replace(
            self, model=model, device_bytes=device_bytes, find_ways=find_ways
        )

    def keys(self) -> tuple[str, ...]:
        """The names that can be read as `estimate[name]`."""
        return (*NAMES, *_COUNTED, "total", "released_total")

    def __getitem__(self, name: str) -> Any:
        return read(self, self.keys(), name)

    @property
    def total(self) -> int:
        """Everything, with all gradients alive together."""
        return self.parameters + self.buffers + self.gradients + self.state

    @property
    def released_total(self) -> int:
        """Everything, with gradients released in the backward pass."""
        return self.total - self.gradients + self.released_gradients

    def __str__(self) -> str:
        rows = [
            ("parameters", self.parameters),
            ("buffers", self.buffers),
            ("gradients", self.gradients),
            ("  released", self.released_gradients),
            ("optimizer state", self.state),
            ("total", self.total),
            ("  gradients released", self.released_total),
        ]
        lines = [f"{f'{self.count:,} parameters':<28}{'memory':>12}{'bytes each':>12}"]
        each = max(1, self.count)
        lines += [f"{name:<28}{_text(size):>12}{size / each:>12.4f}" for name, size in rows]
        return "\n".join(lines)


_COUNTED = tuple(f.name for f in dataclasses.fields(MemoryEstimate) if f.repr)


def count_memory(
    model: nn.Module, optimizer_factory: Callable[[list[nn.Parameter]], Optimizer]
) -> MemoryEstimate:
    """Counts the bytes of a model and its optimizer, see `cruxy_torch.estimate_memory`."""
    params = [local(p.detach()) for p in model.parameters()]
    trained = [local(p.detach()) for p in model.parameters() if p.requires_grad]
    shared = shared_parameters(model)
    sizes = [nbytes(p) for p in trained]
    waiting = sum(nbytes(local(p.detach())) for p in shared if p.requires_grad)
    return MemoryEstimate(
        count=sum(p.numel() for p in params),
        parameters=sum(map(nbytes, model.parameters())),
        buffers=sum(nbytes(local(b)) for b in model.buffers()),
        gradients=sum(sizes),
        released_gradients=min(sum(sizes), waiting + max(sizes, default=0)),
        state=state_after_a_step(trained, optimizer_factory) if trained else 0,
    )


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors that an optimizer keeps: its state, and what its groups hold.

    Args:
        optimizer: any; state that it makes in its first step is counted after that.

    Returns:
        The bytes on this rank, parameters and gradients not included.

    Examples:
        >>> import torch
        >>> from cruxy_torch import state_bytes
        >>> weight = torch.nn.Parameter(torch.ones(10, 10))
        >>> optimizer = torch.optim.SGD([weight], momentum=0.9)
        >>> weight.grad = torch.ones(10, 10)
        >>> optimizer.step()
        >>> state_bytes(optimizer)
        400
    """
    return tensor_bytes(dict(optimizer.state)) + option_bytes(optimizer)


def option_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors among the options of an optimizer's groups."""
    return sum(
        tensor_bytes([value for key, value in group.items() if key != "params"])
        for group in optimizer.param_groups
    )


def tensor_bytes(node: Any) -> int:
    """Bytes of the tensors in nested dictionaries, lists and tuples."""
    return sum(map(nbytes, _tensors(node)))


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor on this rank; of a wrapper subclass, of what it wraps.

    Codes of bitsandbytes count with the scales that they carry.
    """
    tensor = local(tensor)
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(nbytes(getattr(tensor, name)) for name in names)
    beside = [getattr(tensor, name, None) for name in _SCALES]
    scales = [vars(b) if hasattr(b, "absmax") else b for b in beside if b is not None]
    return tensor.numel() * tensor.element_size() + tensor_bytes(scales)


_SCALES = ("quant_state", "SCB")
"""Where a tensor of bitsandbytes has its scales."""


def is_coded(tensor: Tensor) -> bool:
    """Whether a parameter is kept in codes, which no optimizer moves."""
    wrapped = is_traceable_wrapper_subclass(local(tensor))
    return wrapped or not (tensor.is_floating_point() or tensor.is_complex())


def _tensors(node: Any) -> Iterable[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _tensors(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _tensors(value)


def shared_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that more than one module, or one under two names, holds."""
    seen: dict[nn.Parameter, int] = {}
    for _, param in model.named_parameters(remove_duplicate=False):
        seen[param] = seen.get(param, 0) + 1
    return [param for param, count in seen.items() if count > 1]


def state_to_come(optimizer: Optimizer) -> int:
    """Bytes of the state of an optimizer, or of that which its first step will make."""
    if optimizer.state:
        return state_bytes(optimizer)

    def copied(shadows: list[nn.Parameter]) -> Optimizer:
        parts = dict(optimizer.__getstate__())
        waiting = iter(shadows)
        groups = []
        for group in optimizer.param_groups:
            own = copy.deepcopy({k: v for k, v in group.items() if k != "params"})
            groups.append(
                own | {"params": [next(waiting) for p in group["params"] if p.requires_grad]}
            )
        twin = type(optimizer).__new__(type(optimizer))
        twin.__setstate__(parts | {"param_groups": groups, "state": defaultdict(dict)})
        return twin

    params = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [local(p.detach()) for p in params if p.requires_grad]
    return state_after_a_step(trained, copied) if trained else 0


def state_after_a_step(
    trained: list[Tensor], optimizer_factory: Callable[[list[nn.Parameter]], Optimizer]
) -> int:
    """Bytes of the state that an optimizer makes in its first step on tensors like these."""
    return state_bytes(stepped(trained, optimizer_factory))


def stepped(
    trained: list[Tensor], optimizer_factory: Callable[[list[nn.Parameter]], Optimizer]
) -> Optimizer:
    """An optimizer that has taken a step on tensors like these without memory.

    Raises:
        TypeError: where the factory gives no optimizer, or one whose step needs a closure.
    """
    shadows = [nn.Parameter(torch.empty_like(p, device="meta")) for p in trained]
    optimizer = optimizer_factory(shadows)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer_factory must make a torch optimizer, got {optimizer!r}; give for instance "
            "lambda params: torch.optim.AdamW(params, lr=1e-3)."
        )
    for shadow in shadows:
        shadow.grad = torch.empty_like(shadow)
    try:
        with _ValuesOnMeta():
            optimizer.step()
    except TypeError as error:
        if "closure" not in str(error):
            raise
        raise TypeError(
            "the optimizer's step must need no closure, got one that does "
            f"({type(optimizer).__name__}); count its state with state_bytes after a real step."
        ) from error
    return optimizer


class _ValuesOnMeta(TorchDispatchMode):
    """Answers 1 where a step reads a value on the host, which a tensor without memory lacks."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            dtype = args[0].dtype
            return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


def _text(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.2f} {unit}"
