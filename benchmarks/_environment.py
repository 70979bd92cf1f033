"""What a figure depends on besides the code: machine, device, versions, commit."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks._frameworks import room

PACKAGES = ("jax", "jaxlib", "optax", "flax", "torch", "numpy", "cruxy-optax")
"""Whose versions stand beside a figure."""

BASIS = {"jax": ("jax", "jaxlib", "optax", "flax", "numpy"), "torch": ("torch", "numpy")}
"""Whose versions a run in a framework depends on."""


def environment(framework: str) -> dict[str, Any]:
    """The facts that belong beside every measured figure.

    Args:
        framework: "jax" or "torch", which names the device.
    """
    return {
        "device": device(framework),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain")),
    }


def basis(framework: str) -> list[Any]:
    """What a run's figures depend on besides the project's own code: device and versions.

    Args:
        framework: "jax" or "torch".
    """
    return [device(framework), _processor(), versions(BASIS[framework])]


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Installed versions by package; `None` for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def device(framework: str) -> str:
    """The accelerator, or the processor where there is none, as a framework finds it."""
    return room(framework, "device", "the name of the device").name()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    here = Path(__file__).parent
    done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
