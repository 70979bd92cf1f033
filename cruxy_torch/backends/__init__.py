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

from cruxy_torch._native import library, passes, triton_found
from cruxy_torch._native.fit import Passes

CHOICES = ("auto", "native", "triton", "foreach", "reference")
"""What can be chosen for a whole process."""

VARIABLE = "CRUXY_TORCH_BACKEND"
"""The environment variable that chooses, where `use_backend` does not."""

_choices: list["_Choice"] = []
"""What `use_backend` chose and nothing took back; the last counts, without any the environment."""


class Backend(NamedTuple):
    """One of the ways a step can be computed. All give the same result but for rounding.

    Attributes:
        name: `"native"`, the C library on CPU; `"triton"`, kernels on CUDA devices; `"foreach"`,
            torch's foreach calls on whole lists of tensors; `"reference"`, tensor by tensor, which
            all others are held to; `"compile"`,
            `torch.compile` of the whole step.
        available: whether it can be taken on this machine, as far as is known without building.
        why: why it cannot be taken, in one line; of `"native"` the last line of the compiler, of
            `"triton"` of what a kernel failed with.
        path: the file of the library, where there is one.
        flags: what it is compiled with; of `"triton"` its version.
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
        why: how many take neither `"native"` nor `"triton"`, by the reason.
    """

    tensors: Mapping[str, int]
    why: Mapping[str, int]


def backends(build: bool = False) -> list[Backend]:
    """What this machine can compute a step with.

    Args:
        build: builds the C library if need be, and compiles a small function, to know for sure.
            Without it nothing is built, and a library that was built before is loaded.

    Returns:
        `native`, `triton`, `foreach`, `reference` and `compile`, in this order.

    Examples:
        >>> import cruxy_torch
        >>> [backend.name for backend in cruxy_torch.backends()]
        ['native', 'triton', 'foreach', 'reference', 'compile']
    """
    found = library.found(build=build)
    native = Backend("native", found.handle is not None, found.why, found.path, found.flags)
    others = [Backend(name, True) for name in ("foreach", "reference")]
    return [native, _triton(), *others, _compile(build)]


def use_backend(name: str | None) -> contextlib.AbstractContextManager[Any]:
    """Chooses what steps are computed with, for the whole process, from the next step on.

    It holds for optimizers that were not told themselves: `fused`, `foreach` or `compile` of
    `CruxyOptimizer` count more. A step that the user's own `torch.compile` traces is not affected.

    Args:
        name: `"native"`, the C library, which must be there, for tensors on the CPU that it can
            take; `"triton"`, which must be there, for those on CUDA devices that it can take; each
            leaves other devices their default. `"foreach"` or `"reference"` for all tensors; `None`
            or `"auto"` for the default: the library on CPU where there is one, Triton on CUDA
            devices likewise, and foreach calls for the rest on any device but the CPU. The
            environment variable `CRUXY_TORCH_BACKEND` takes the same words; it is read at the first
            step, and counts where this function was not called.

    Returns:
        A context manager. The choice holds at once; leaving a `with` block takes it back, and what
        was chosen inside without a block. Blocks may end in any order: those that have not ended
        hold, the one that began last first.

    Raises:
        ValueError: where there is no backend of that name.
        RuntimeError: where `"native"` was chosen and the library cannot be built, or `"triton"`,
            which cannot be used.

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
    if choice.name == "triton":
        _insist_on_triton()
    if len(_choices) > 1 and not (_choices[-1].is_block or _choices[-2].is_block):
        del _choices[-2]  # the next one took its place for good
    _choices.append(choice)
    return choice


def chosen() -> str:
    """What steps are to be computed with: one of `CHOICES`."""
    return _choices[-1].name if _choices else _of_environment()


def path(device: torch.device) -> tuple[Passes | None, bool]:
    """The library to take, and whether to take foreach calls for the rest.

    Args:
        device: of the controller.

    Raises:
        ValueError: where the environment names a backend that there is not.
        RuntimeError: where it names a library that cannot be used on this device.
    """
    foreach = device.type != "cpu"
    if torch.compiler.is_compiling():
        return None, foreach
    choice = chosen()
    if choice in ("foreach", "reference"):
        return None, choice == "foreach"
    if choice == "native" and device.type == "cpu":
        _insist()
    if choice == "triton" and device.type == "cuda":
        _insist_on_triton(device)
    return fastest(device), foreach


def fastest(device: torch.device) -> Passes | None:
    """The library for a device; `None` where it is not there.

    On CUDA devices Triton, on the CPU the C library, or, where `"triton"` was chosen and
    `TRITON_INTERPRET=1` is set, Triton's interpreter, by which kernels are tested.
    """
    interprets = device.type == "cpu" and chosen() == "triton" and triton_found.interpreted()
    if device.type == "cuda" or interprets:
        if not triton_found.available(device):
            return None
        from cruxy_torch._native import triton_passes  # what it imports takes a while

        return triton_passes
    return passes if device.type == "cpu" and library.available() else None


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


def _insist_on_triton(device: torch.device | None = None) -> None:
    found = triton_found.found(device)
    if not found.usable and not found.failed:
        raise RuntimeError(
            f"the backend 'triton' needs Triton and a CUDA device, but {found.why!r}; use 'auto' "
            "for the slower path."
        )


def _triton() -> Backend:
    """Whether kernels can be compiled for what is there, or run by the interpreter."""
    found = triton_found.found()
    version = (f"triton {found.version}",) if found.version else ()
    return Backend("triton", found.usable, found.why, flags=version)


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
