"""Whether Triton can be used here, and what has made a process do without it."""

import functools
import importlib.metadata
import logging
import os
from typing import Any, NamedTuple

import torch

OLDEST = (3, 2)
"""The oldest version of Triton that compiles the kernels, that of PyTorch 2.6."""

CAPABILITY = (7, 0)
"""The smallest compute capability that Triton has code for."""

_log = logging.getLogger(__name__)
_set_aside: dict[str, str] = {}
"""By the type of the device what was found when a kernel failed on it."""


class Found(NamedTuple):
    """What has come of looking for Triton.

    Attributes:
        why: why it cannot be used, in one line; empty where it can.
        version: what is installed; empty for nothing.
        failed: whether it is a kernel that failed.
    """

    why: str = ""
    version: str = ""
    failed: bool = False

    @property
    def usable(self) -> bool:
        """Whether it can be used."""
        return not self.why


def found(device: torch.device | None = None) -> Found:
    """Whether it can be used.

    Args:
        device: of the tensors; `None` for any that there is.
    """
    version = _version()
    if not version:
        return Found("Triton is not installed; CUDA builds of PyTorch bring it")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST:
        return Found(f"Triton {version} is older than {'.'.join(map(str, OLDEST))}", version)
    on_cuda = device.type == "cuda" if device is not None else not interpreted()
    if on_cuda and torch.version.hip is not None:
        return Found("a build of PyTorch for ROCm, on which this was not tried", version)
    if interpreted():
        if on_cuda:
            return Found("TRITON_INTERPRET=1 runs kernels on the CPU alone", version)
        return _unless_set_aside("cpu", version)
    if not on_cuda:
        return Found(f"no kernels for {'cpu' if device is None else device.type}", version)
    why = _why_not_on_cuda(device)
    return Found(why, version) if why else _unless_set_aside("cuda", version)


def interpreted() -> bool:
    """Whether kernels are run on the CPU, by Triton's interpreter, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "on", "true", "yes", "y")


def available(device: torch.device | None = None) -> bool:
    """Whether it can be used, see `found`."""
    return found(device).usable


def set_aside(device: torch.device, error: Exception) -> None:
    """Does without Triton from now on, and says so once."""
    lines = str(error).strip().splitlines() or [""]
    why = f"a kernel failed: {type(error).__name__}: {lines[-1].strip()}"
    if device.type not in _set_aside:
        _set_aside[device.type] = why
        _log.warning("%s; steps go on without Triton, with the same numbers", why)


def forgive() -> None:
    """Forgets that a kernel failed."""
    _set_aside.clear()


def _unless_set_aside(kind: str, version: str) -> Found:
    why = _set_aside.get(kind, "")
    return Found(why, version, failed=bool(why))


@functools.cache
def _version() -> str:
    try:
        import triton  # pyright: ignore[reportMissingImports]

        return str(getattr(triton, "__version__", "")) or importlib.metadata.version("triton")
    except Exception:  # whatever a broken installation raises when it is imported
        return ""


def _why_not_on_cuda(device: Any) -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}, below 7.0"
    return ""
