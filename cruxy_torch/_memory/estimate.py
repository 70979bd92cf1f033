"""What a training run will keep in memory, counted before anything is allocated."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from cruxy_torch._distributed.shards import local


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """What one rank of a run keeps, in bytes; printed, a table.

    Activations, temporaries and what the allocator leaves unused come on top.

    Attributes:
        count: elements of the parameters, those that are not trained included.
        parameters: bytes of the parameters.
        buffers: bytes of the model's buffers, such as running means.
        gradients: bytes of the gradients where all live together, as between `backward` and `step`.
        released_gradients: the most that is alive at once where each gradient is freed as soon as
            its parameter is updated: the largest of them, and those of parameters that several
            modules share, which wait for the last of these.
        state: bytes of the optimizer's state.
    """

    count: int
    parameters: int
    buffers: int
    gradients: int
    released_gradients: int
    state: int

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


def estimate_memory(
    model: nn.Module, optimizer_factory: Callable[[list[nn.Parameter]], Optimizer]
) -> MemoryEstimate:
    """Counts what a model and its optimizer will keep, before anything is allocated.

    The state is what the optimizer itself makes: the factory is given parameters like the model's
    on the `meta` device, where tensors have shapes and no memory, and takes one step on them. It
    works for every optimizer of this package, of `torch.optim`, and any other whose first step
    allocates its state with torch's own operations and needs no closure (`LBFGS` does).

    Args:
        model: on any device, best on `meta` (`with torch.device("meta"): model = ...`); it is left
            as it is. Parameters sharded as `DTensor` count with this rank's shard.
        optimizer_factory: makes the optimizer from the list of the parameters that are trained, in
            the order of `model.parameters()`; an optimizer's class will do. Leave out
            `fused=True`, which the `meta` device does not have; it does not change the state.

    Returns:
        The bytes by kind.

    Raises:
        TypeError: where the factory gives no optimizer, or one whose step needs a closure.

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
    """
    params = [local(p.detach()) for p in model.parameters()]
    trained = [local(p.detach()) for p in model.parameters() if p.requires_grad]
    shared = _shared_parameters(model)
    sizes = [nbytes(p) for p in trained]
    waiting = sum(nbytes(local(p.detach())) for p in shared if p.requires_grad)
    return MemoryEstimate(
        count=sum(p.numel() for p in params),
        parameters=sum(map(nbytes, params)),
        buffers=sum(nbytes(local(b)) for b in model.buffers()),
        gradients=sum(sizes),
        released_gradients=min(sum(sizes), waiting + max(sizes, default=0)),
        state=_state_after_a_step(trained, optimizer_factory) if trained else 0,
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
    """Bytes of a tensor on this rank; of a wrapper subclass, of what it wraps."""
    tensor = local(tensor)
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(nbytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def _tensors(node: Any) -> Iterable[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _tensors(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _tensors(value)


def _shared_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that more than one module, or one under two names, holds."""
    seen: dict[nn.Parameter, int] = {}
    for _, param in model.named_parameters(remove_duplicate=False):
        seen[param] = seen.get(param, 0) + 1
    return [param for param, count in seen.items() if count > 1]


def _state_after_a_step(
    trained: list[Tensor], optimizer_factory: Callable[[list[nn.Parameter]], Optimizer]
) -> int:
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
    return state_bytes(optimizer)


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
