"""Which code takes a step: what there is on this machine, and what a process is to take.

`python -m cruxy_torch.backends` prints what `backends()` says, for bug reports.
"""

import contextlib
import functools
import importlib.util
import itertools
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from cruxy_torch._native import library

CHOICES = ("auto", "native", "foreach", "reference")
"""What can be chosen for a whole process."""

VARIABLE = "CRUXY_TORCH_BACKEND"
"""The environment variable that chooses, where `use_backend` does not."""

_choices: list["_Choice"] = []
"""What `use_backend` chose and nothing took back; the last counts, without any the environment."""


class Backend(NamedTuple):
    """One of the ways a step can be computed. All give the same result but for rounding.

    Attributes:
        name: `"native"`, the C library on CPU; `"foreach"`, torch's foreach calls on whole lists of
            tensors; `"reference"`, tensor by tensor, which all others are held to; `"compile"`,
            `torch.compile` of the whole step.
        available: whether it can be taken on this machine, as far as is known without building.
        why: why it cannot be taken, in one line; of `"native"` the last line of the compiler.
        path: the file of the library, where there is one.
        flags: what it is compiled with.
    """

    name: str
    available: bool
    why: str = ""
    path: Path | None = None
    flags: tuple[str, ...] = ()


class BackendUse(NamedTuple):
    """What would take the next step of an optimizer, see `CruxyOptimizer.backend`.

    Attributes:
        tensors: how many tensors each backend takes, by its name; those of 0 are left out.
        why: how many do not take `"native"`, by the reason.
    """

    tensors: Mapping[str, int]
    why: Mapping[str, int]


def backends(build: bool = False) -> list[Backend]:
    """What this machine can compute a step with.

    Args:
        build: builds the C library if need be, and compiles a small function, to know for sure.
            Without it nothing is built, and a library that was built before is loaded.

    Returns:
        `native`, `foreach`, `reference` and `compile`, in this order.

    Examples:
        >>> import cruxy_torch
        >>> [backend.name for backend in cruxy_torch.backends()]
        ['native', 'foreach', 'reference', 'compile']
    """
    found = library.found(build=build)
    native = Backend("native", found.handle is not None, found.why, found.path, found.flags)
    return [native, Backend("foreach", True), Backend("reference", True), _compile(build)]


def use_backend(name: str | None) -> contextlib.AbstractContextManager[Any]:
    """Chooses what steps are computed with, for the whole process, from the next step on.

    It holds for optimizers that were not told themselves: `fused`, `foreach` or `compile` of
    `CruxyOptimizer` count more. A step that the user's own `torch.compile` traces is not affected.

    Args:
        name: `"native"`, the C library, which must be there, for tensors on the CPU that it can
            take; `"foreach"` or `"reference"` for all tensors; `None` or `"auto"` for the default,
            the library on CPU where there is one, and foreach calls on other devices. The
            environment variable `CRUXY_TORCH_BACKEND` takes the same words; it is read at the first
            step, and counts where this function was not called.

    Returns:
        A context manager. The choice holds at once; leaving a `with` block takes it back, and what
        was chosen inside without a block. Blocks may end in any order: those that have not ended
        hold, the one that began last first.

    Raises:
        ValueError: where there is no backend of that name.
        RuntimeError: where `"native"` was chosen and the library cannot be built.

    Examples:
        >>> import torch
        >>> import cruxy_torch
        >>> x = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = cruxy_torch.CruxyOptimizer([x])
        >>> (x**2).sum().backward()
        >>> with cruxy_torch.use_backend("reference"):
        ...     optimizer.step(loss=3.0)
        ...     print(optimizer.backend.tensors)
        3.0
        {'reference': 1}
    """
    choice = _Choice(_checked("backend", name))
    if choice.name == "native":
        _insist()
    if len(_choices) > 1 and not (_choices[-1].is_block or _choices[-2].is_block):
        del _choices[-2]  # the next one took its place for good
    _choices.append(choice)
    return choice


def chosen() -> str:
    """What steps are to be computed with: one of `CHOICES`."""
    return _choices[-1].name if _choices else _of_environment()


def path(device: torch.device) -> tuple[bool, bool]:
    """Whether to take the C library, and whether to take foreach calls for the rest.

    Args:
        device: of the controller.

    Raises:
        ValueError: where the environment names a backend that there is not.
        RuntimeError: where it names the library, which cannot be built.
    """
    on_cpu = device.type == "cpu"
    if torch.compiler.is_compiling():
        return False, not on_cpu
    choice = chosen()
    if choice in ("foreach", "reference"):
        return False, choice == "foreach"
    if choice == "native" and on_cpu:
        _insist()
    return on_cpu and library.available(), not on_cpu


class _Choice(contextlib.AbstractContextManager[Any]):
    """A word of `CHOICES`, for good, or until its block ends."""

    def __init__(self, name: str) -> None:
        self.name, self.is_block = name, False

    def __enter__(self) -> Self:
        self.is_block = True
        if self not in _choices:
            _choices.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        if self in _choices:
            at = _choices.index(self)
            later = _choices[at + 1 :]
            _choices[at:] = itertools.dropwhile(lambda choice: not choice.is_block, later)


@functools.cache
def _of_environment() -> str:
    return _checked(VARIABLE, os.environ.get(VARIABLE) or None)


def _checked(what: str, name: str | None) -> str:
    choice = "auto" if name is None else name
    if choice not in CHOICES:
        raise ValueError(
            f"{what} must be one of {', '.join(map(repr, CHOICES))}, got {name!r}; 'auto' takes "
            "the C library on CPU where there is one."
        )
    return choice


def _insist() -> None:
    if not library.available():
        raise RuntimeError(
            "the backend 'native' needs a C compiler (cc, gcc or clang, or the variable CC), but "
            f"{library.found(build=True).why!r}; use 'auto' for the slower path."
        )


def _compile(build: bool) -> Backend:
    """Whether `torch.compile` has what it compiles with."""
    if build:
        try:
            torch.compile(lambda x: x + 1.0)(torch.ones(2, dtype=torch.float32, device="cpu"))
        except Exception as error:  # whatever a compiler or a cache may raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return Backend("compile", False, lines[0])
        return Backend("compile", True)
    text = os.environ.get("CXX", "")
    try:
        named = shlex.split(text)[:1]
    except ValueError as error:
        return Backend("compile", False, f"CXX must be a command, got {text!r}: {error}")
    found = any(map(shutil.which, named or ("c++", "g++", "clang++")))
    if found or (torch.cuda.is_available() and importlib.util.find_spec("triton")):
        return Backend("compile", True)
    return Backend("compile", False, "no C++ compiler found: c++, g++ or clang++, or CXX")
