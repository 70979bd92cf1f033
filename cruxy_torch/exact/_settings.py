"""The engine and bits of exact products on a device, and the namespace of exact functions there."""

import functools
from typing import Any

import torch

from cruxy_exact import engines
from cruxy_exact.engines import Precision
from cruxy_torch._native.exact import NAMESPACE
from cruxy_torch.backends import path

_wanted = engines.DEFAULT


def use(*, bits: int | None = None, engine: str | None = None) -> Precision:
    """Sets the bits and the engine of all exact products that follow.

    Args:
        bits: of the rounded factors, 8 to 23; part of every result and of `checksum`. `None` leaves
            them as they are; 20 at first.
        engine: `"f64"`, `"int8"`, `"int8_direct"` or `"digits"`; no part of any result. `None`
            leaves it as it is; `"f64"` at first. It is tested on each device before its first
            product there, and replaced with a warning where it is not exact.

    Returns:
        What holds now.

    Raises:
        ValueError: where `bits` or `engine` is none of these.

    Examples:
        >>> from cruxy_torch import exact
        >>> exact.use(bits=22).bits
        22
        >>> exact.use(bits=20)
        Precision(bits=20, engine='f64')
    """
    global _wanted
    _wanted = Precision(
        _wanted.bits if bits is None else bits, _wanted.engine if engine is None else engine
    )
    return _wanted


def precision(device: torch.device) -> Precision:
    """The bits that are wanted, and an engine that is exact on this device.

    Raises:
        RuntimeError: where none is, as on Apple's GPUs, which have no float64.
    """
    return _tested(_wanted, device.type, device.index)


@functools.cache
def _tested(wanted: Precision, kind: str, index: int | None) -> Precision:
    if kind in ("mps", "xla"):
        raise RuntimeError(
            f"exact arithmetic needs IEEE float64, which the device {kind!r} lacks; train on a CPU "
            "or an NVIDIA GPU."
        )
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        device = kind if index is None else f"{kind}:{index}"
        like = torch.zeros(1, dtype=torch.float32, device=device)
        return engines.choose(wanted, like, xp=torch)


def namespace(device: torch.device | str) -> Any:
    """The array namespace of exact functions on a device: PyTorch, with C kernels on CPU.

    The kernels have the same bits; `use_backend("reference")` does without them.
    """
    if torch.compiler.is_compiling() or torch.device(device).type != "cpu":
        return torch
    return NAMESPACE if path(torch.device(device))[0] else torch
