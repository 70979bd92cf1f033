"""The law's memory as a flat dictionary of tensors, which every kind of checkpoint keeps.

It lives in `param_groups[0]["controller"]`. A NamedTuple would be lost on the way through
`state_dict`, and a string key in `optimizer.state` through distributed checkpoints.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from cruxy_control import Controls, Signals
from cruxy_torch import _kernels

FORMAT = 1
"""Version of the layout of this dictionary and of the state beside the parameters."""

REPORT = (
    "learning_rate", "phase", "curvature", "beta1", "beta2", "clip_threshold", "clip_scale",
    "meta_scale", "phase_scale", "warning", "grad_norm", "gamma_norm", "loss", "ok",
)  # fmt: skip
"""What the last step measured and decided: the order of the vector `memory["report"]`."""

COUNTERS = ("step", "skipped_total", "skipped_in_a_row")
"""Good steps, and skipped ones in all and running: int32 scalars."""


class Namespace:
    """`torch` as a law sees it, with new vectors on the device of the controller."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def arange(self, *args: Any, **kwargs: Any) -> Tensor:
        """`torch.arange` on the controller's device, so that no step copies from the host."""
        return torch.arange(*args, device=self._device, **kwargs)


def namespace(memory: dict[str, Tensor]) -> Any:
    """What the law of this memory runs on.

    NumPy, on the very same bytes, where they lie on the CPU: a scalar operation costs a quarter of
    torch's there. torch on other devices and where a compiler looks on.
    """
    device = memory["step"].device
    if device.type == "cpu" and not torch.compiler.is_compiling():
        return numpy
    return Namespace(device)


def start(law: Any, device: torch.device) -> dict[str, Tensor]:
    """The memory before the first step."""
    like = torch.zeros((), device=device)
    memory = {f"law.{name}": leaf.clone() for name, leaf in _leaves(law.init(like, xp=torch))}
    for name in COUNTERS:
        memory[name] = torch.zeros((), dtype=torch.int32, device=device)
    memory["report"] = torch.full((len(REPORT),), math.nan, device=device)
    memory["format"] = torch.full((), FORMAT, dtype=torch.int32, device=device)
    return memory


def advance(law: Any, template: Any, memory: dict[str, Tensor], signals: Signals) -> Controls:
    """One step of the law; updates the memory in place and returns what it decided.

    The controls are scalars of `namespace(memory)`.
    """
    xp = namespace(memory)
    values = _values(memory, xp)
    with numpy.errstate(all="ignore") if xp is numpy else contextlib.nullcontext():
        sensed = Signals(*_values(signals._asdict(), xp).values())
        state, controls = law.step(_restored(template, values, "law."), sensed, xp=xp)
    new = {f"law.{name}": leaf for name, leaf in _leaves(state)}
    good = xp.where(controls.ok, xp.ones_like(values["step"]), 0)
    new["step"] = values["step"] + good
    new["skipped_total"] = values["skipped_total"] + (1 - good)
    new["skipped_in_a_row"] = (values["skipped_in_a_row"] + 1) * (1 - good)
    _store(memory, new, xp)
    return controls


def report(memory: dict[str, Tensor], values: Mapping[str, Any]) -> None:
    """Keeps what a step measured and decided, on the device, until somebody asks."""
    xp = namespace(memory)
    if xp is numpy:
        memory["report"].numpy()[...] = [values[name] for name in REPORT]
    else:
        memory["report"].copy_(torch.stack([values[name].to(torch.float32) for name in REPORT]))


def _values(tensors: Mapping[str, Tensor], xp: Any) -> Mapping[str, Any]:
    if xp is not numpy:
        return tensors
    # [()] turns a 0-d array into a scalar, which computes several times faster.
    return {name: t.numpy()[()] for name, t in tensors.items()}


def _store(memory: dict[str, Tensor], new: dict[str, Any], xp: Any) -> None:
    if xp is numpy:
        for name, value in new.items():
            memory[name].numpy()[...] = value
    else:
        _kernels.assign([memory[name] for name in new], list(new.values()))


def everything(memory: dict[str, Tensor]) -> Tensor:
    """The report and the counters as one float64 vector, for `named`."""
    counters = torch.stack([memory[name] for name in COUNTERS])
    return torch.cat([memory["report"].to(torch.float64), counters.to(torch.float64)])


def named(numbers: list[float]) -> dict[str, float | int | bool]:
    """Numbers in the order of `everything` by name, counters whole and `ok` a truth value."""
    named: dict[str, float | int | bool] = dict(zip((*REPORT, *COUNTERS), numbers, strict=True))
    named["ok"] = bool(named["ok"])
    return named | {name: int(named[name]) for name in COUNTERS}


def check(memory: dict[str, Tensor], saved: Mapping[str, Any] | None) -> None:
    """Raises unless a saved memory fits this one.

    Raises:
        ValueError: where there is none, or of another format, another law or another length.
    """
    if saved is None:
        raise ValueError(
            'the state must hold param_groups[0]["controller"], got none; '
            "only what CruxyOptimizer.state_dict() gave can be loaded."
        )
    if int(saved.get("format", 0)) != FORMAT:
        raise ValueError(
            f"the controller's format must be {FORMAT}, got {int(saved.get('format', 0))}; "
            "load it with the version of cruxy_torch that saved it."
        )
    if set(saved) != set(memory):
        raise ValueError(
            "the saved controller must belong to the same law, got "
            f"{sorted(set(saved) ^ set(memory))} on one side only; build the optimizer with the "
            "mode it was saved with."
        )
    for name, tensor in memory.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(
                f"{name} must have shape {tuple(tensor.shape)}, got {tuple(saved[name].shape)}; "
                "build the optimizer with the law it was saved with."
            )


def load(memory: dict[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copies a checked memory into this one, whose tensors and device stay."""
    for name, tensor in memory.items():
        tensor.copy_(saved[name])


def _leaves(state: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in zip(state._fields, state, strict=True):
        if isinstance(value, tuple):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _restored(template: Any, memory: Mapping[str, Any], prefix: str) -> Any:
    """The law's state with the structure of `template` and the values of `memory`."""
    fields = (
        _restored(value, memory, f"{prefix}{name}.") if isinstance(value, tuple)
        else memory[prefix + name]
        for name, value in zip(template._fields, template, strict=True)
    )  # fmt: skip
    return type(template)(*fields)
