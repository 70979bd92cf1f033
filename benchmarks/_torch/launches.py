"""What a step starts on a device, counted from what it calls: our kernels, and torch's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cruxy_torch._native import triton_launch

_BARE = ("empty", "detach", "is_pinned", "record_stream", "_record_function", "_unsafe_view")


class Launch(NamedTuple):
    """A kernel of ours that was started.

    Attributes:
        kernel: its name.
        moved: bytes of tensors that it reads and writes.
        after: operations of torch before it in the step.
    """

    kernel: str
    moved: int
    after: int = 0


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
    calls, launch = _Calls(), triton_launch.launch
    ours: list[Launch] = []

    def record(device: Any, kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
        with torch._C._DisableTorchDispatch():  # what the interpreter does with tensors is no call
            launch(device, kernel, grid, *args, **kwargs)
            name = getattr(getattr(kernel, "fn", kernel), "__name__", "")
            given = dict(zip(getattr(kernel, "arg_names", ()), args, strict=False)) | kwargs
            ours.append(Launch(name, bytes_of(name, given, grid[0]), len(calls.names)))

    triton_launch.launch = record
    try:
        with calls:
            step()
    finally:
        triton_launch.launch = launch
    return Counted(ours, calls.names)


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


_PASSES: dict[str, dict[str, int]] = {
    "sums_of_chunks": {"G": 1, "M": 1, "P": 1},
    "update_of_chunks": {"G": 1, "P": 2, "M": 2, "V": 2, "AVERAGED": 2},
    "adam_of_tensor": {"G": 1, "P": 2, "M": 2, "V": 2},
    "sign_of_tensor": {"G": 1, "P": 2},
    "momentum_of_tensor": {"G": 1, "M": 2, "direction": 1},
    "move_of_tensor": {"direction": 1, "P": 2},
    "squares_of_matrix": {"G": 1},
    "sizes_of_matrix": {"G": 1, "P": 1},
    "move_of_matrix": {"G": 1, "P": 2},
}
"""How often a kernel reads or writes every element of what has which form; others touch few."""

_WIDTHS = {-1: 0.0, 0: 4.0, 1: 2.0, 2: 1.0 + 2 / 256, 3: 0.5 + 2 / 256}
"""Bytes an element by its form, see `triton_launch.Form`, with the scale of its block."""


def bytes_of(kernel: str, given: dict[str, Any], programs: int) -> int:
    """What a launch reads and writes of tensors, from the forms that it is given.

    Args:
        kernel: its name.
        given: its arguments by name.
        programs: how many it has, one for each chunk of many tensors.
    """
    passes = _PASSES.get(kernel)
    if passes is None:
        return 0
    float32 = {"direction": 4.0, "AVERAGED": 4.0 if given.get("AVERAGED") else 0.0}
    each = sum(
        times * (float32[form] if form in float32 else _WIDTHS[given[form]])
        for form, times in passes.items()
    )
    return round(each * _elements(given, programs))


def _elements(given: dict[str, Any], programs: int) -> int:
    if "chunks" in given:
        taken = given["chunks"][:programs, 0].unique().long()
        return int(given["table"][9, taken].sum())
    return given["numel"] if "numel" in given else given["rows"] * given["columns"]
