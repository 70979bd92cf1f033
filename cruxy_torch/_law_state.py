"""The law's memory as a flat dictionary of tensors, which every kind of checkpoint keeps.

It lives in `param_groups[0]["controller"]`. A NamedTuple would be lost on the way through
`state_dict`, and a string key in `optimizer.state` through distributed checkpoints.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from cruxy_control import Controls, Signals
from cruxy_control.controls import neutral
from cruxy_control.law import needs_alignment
from cruxy_torch import _kept as _storage
from cruxy_torch import _scalar_numpy as _numpy

FORMAT = 2
"""Version of the layout of this dictionary and of the state beside the parameters."""

REPORT = (
    "learning_rate", "phase", "curvature", "beta1", "beta2", "clip_threshold", "clip_scale",
    "meta_scale", "phase_scale", "warning", "alignment", "grad_norm", "gamma_norm", "loss", "ok",
)  # fmt: skip
"""What the last step measured and decided: the order of the vector `memory["report"]`."""

CONTROLS = tuple(name for name in Controls._fields if name != "ok")
"""What the law ordered on the last good step: the order of the vector `memory["controls"]`."""

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

    NumPy's scalars, on the very same bytes, where they lie on the CPU: an operation costs a tenth
    of torch's there. torch on other devices and where a compiler looks on.
    """
    device = memory["step"].device
    if device.type == "cpu" and not torch.compiler.is_compiling():
        return _numpy
    return Namespace(device)


def start(law: Any, device: torch.device) -> dict[str, Tensor]:
    """The memory before the first step."""
    like = torch.zeros((), device=device)
    state = law.init(like, xp=torch)
    names = leaves(names_of(state))
    memory = {name: leaf.clone() for name, leaf in zip(names, leaves(state), strict=True)}
    for name in COUNTERS:
        memory[name] = torch.zeros((), dtype=torch.int32, device=device)
    if needs_alignment(law):
        memory["limit_scale"] = torch.ones((), device=device)
    first = neutral(torch.ones_like(like, dtype=torch.bool), xp=torch)
    memory["controls"] = torch.stack([getattr(first, name) for name in CONTROLS])
    memory["report"] = torch.full((len(REPORT),), math.nan, device=device)
    memory["format"] = torch.full((), FORMAT, dtype=torch.int32, device=device)
    return memory


def advance(law: Any, names: Any, memory: dict[str, Tensor], signals: Signals) -> Controls:
    """One step of the law; updates the memory in place and returns what it decided.

    `names` are those of the law's state, as `names_of` gives them. The controls are scalars of
    `namespace(memory)`.
    """
    xp = namespace(memory)
    values = dict(zip(memory, scalars(memory.values(), xp), strict=True))
    with quiet(xp):
        sensed = Signals(*scalars(signals, xp))
        state, controls = law.step(restored(names, values), sensed, xp=xp)
    new = dict(zip(leaves(names), leaves(state), strict=True))
    good = xp.where(controls.ok, xp.ones_like(values["step"]), 0)
    new["step"] = values["step"] + good
    new["skipped_total"] = values["skipped_total"] + (1 - good)
    new["skipped_in_a_row"] = (values["skipped_in_a_row"] + 1) * (1 - good)
    _store(memory, new, xp)
    _hold(memory["controls"], controls, xp)
    return controls


def held(memory: dict[str, Tensor]) -> Controls:
    """What the law ordered on the last good step; before the first, what changes nothing."""
    xp = namespace(memory)
    vector = memory["controls"]
    values = vector.numpy() if xp is _numpy else vector.unbind()
    ok = numpy.True_ if xp is _numpy else torch.ones((), dtype=torch.bool, device=vector.device)
    return Controls(ok=ok, **dict(zip(CONTROLS, values, strict=True)))


def _hold(vector: Tensor, controls: Controls, xp: Any) -> None:
    values = [getattr(controls, name) for name in CONTROLS]
    if xp is not _numpy:
        vector.copy_(torch.where(controls.ok, torch.stack(values), vector))
    elif controls.ok:
        vector.numpy()[...] = values


def report(memory: dict[str, Tensor], values: Mapping[str, Any]) -> None:
    """Keeps what a step measured and decided, on the device, until somebody asks."""
    xp = namespace(memory)
    if xp is _numpy:
        memory["report"].numpy()[...] = [values[name] for name in REPORT]
    else:
        memory["report"].copy_(torch.stack([values[name].to(torch.float32) for name in REPORT]))


def scalars(values: Iterable[Any], xp: Any) -> list[Any]:
    """Tensors as what a law computes with in `xp`; numbers as they are."""
    if xp is not _numpy:
        return list(values)
    # [()] turns a 0-d array into a scalar, which computes several times faster.
    return [v.numpy()[()] if isinstance(v, Tensor) else v for v in values]


def quiet(xp: Any) -> contextlib.AbstractContextManager[Any]:
    """Keeps NumPy from warning of what the other namespaces compute in silence."""
    return numpy.errstate(all="ignore") if xp is _numpy else contextlib.nullcontext()


def _store(memory: dict[str, Tensor], new: dict[str, Any], xp: Any) -> None:
    if xp is _numpy:
        for name, value in new.items():
            memory[name].numpy()[...] = value
    else:
        _storage.assign([memory[name] for name in new], list(new.values()))


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


def names_of(state: Any, prefix: str = "law.") -> Any:
    """A state of the law with the name of each value in the memory in its place."""
    fields = zip(state._fields, state, strict=True)
    return type(state)(
        *(names_of(v, f"{prefix}{k}.") if isinstance(v, tuple) else prefix + k for k, v in fields)
    )


def restored(names: Any, memory: Mapping[str, Any]) -> Any:
    """The law's state with the values that the memory has under `names`."""
    return type(names)(*[restored(n, memory) if isinstance(n, tuple) else memory[n] for n in names])


def leaves(state: Any) -> list[Any]:
    """What a nested NamedTuple holds, in order."""
    flat = []
    for value in state:
        if isinstance(value, tuple):
            flat += leaves(value)
        else:
            flat.append(value)
    return flat
