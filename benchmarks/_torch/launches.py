"""What a step starts on a device, counted from what it calls: our kernels, and torch's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cruxy_torch._native import triton_launch

SCALARS = "decide"
"""The name of the kernel of all that is computed on scalars."""

_BARE = ("empty", "detach", "is_pinned", "record_stream", "_record_function")


class Launch(NamedTuple):
    """A kernel of ours that was started.

    Attributes:
        kernel: its name.
        moved: bytes of tensors that it reads and writes.
    """

    kernel: str
    moved: int


class Counted(NamedTuple):
    """What a step starts.

    Attributes:
        ours: our kernels, in order.
        torch: the operations of torch that start at least one kernel or copy, by name.
    """

    ours: list[Launch]
    torch: list[str]


def counted(step: Callable[[], Any]) -> Counted:
    """What a step starts; it has to be on a device, or under Triton's interpreter."""
    calls = _Calls()
    with recorded(calls) as ours:
        step()
    return Counted(ours, calls.names)


@contextmanager
def recorded(calls: "_Calls | None" = None) -> Iterator[list[Launch]]:
    """Fills a list with the launches of our kernels.

    Args:
        calls: what looks on between them.
    """
    launches: list[Launch] = []
    launch = triton_launch.launch

    def record(device: Any, kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
        if calls is None:
            launch(device, kernel, grid, *args, **kwargs)
        else:  # what the interpreter does with tensors is no launch
            with torch._C._DisableTorchDispatch():
                launch(device, kernel, grid, *args, **kwargs)
        name = getattr(getattr(kernel, "fn", kernel), "__name__", "")
        with torch._C._DisableTorchDispatch():
            launches.append(Launch(name, bytes_of(args, kwargs, grid[0])))

    triton_launch.launch = record
    try:
        if calls is None:
            yield launches
        else:
            with calls:
                yield launches
    finally:
        triton_launch.launch = launch


class _Calls(TorchDispatchMode):
    """Notes every operation that is neither a view nor memory that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not (func.is_view or name.startswith(_BARE)):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def bytes_of(args: tuple[Any, ...], kwargs: dict[str, Any], chunks: int) -> int:
    """What a launch reads and writes of tensors, from its table and the form it has.

    Args:
        args: of the kernel.
        kwargs: likewise.
        chunks: how many it takes.
    """
    if "G" not in kwargs:  # sums of sums, and what is computed of them
        return 0
    taken = args[2][:chunks, 0].unique().long()
    elements = int(args[0][9, taken].sum())
    width = {-1: 0.0, 0: 4.0, 1: 2.0, 2: 1.0 + 2 / 256, 3: 0.5 + 2 / 256}
    p, g, m = (width[kwargs[name]] for name in ("P", "G", "M"))
    if "V" not in kwargs:
        return round(elements * (p + g + m))
    v, average = width[kwargs["V"]], 4.0 if kwargs["AVERAGED"] else 0.0
    return round(elements * (g + 2 * (p + m + v + average)))
