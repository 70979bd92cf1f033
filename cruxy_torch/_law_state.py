"""The law's state as a flat dictionary of tensors, which every kind of checkpoint keeps.

It lives in `param_groups[0][KEY]`. A NamedTuple would be lost on the way through
`state_dict`, and a string key in `optimizer.state` through distributed checkpoints.
"""

import contextlib
import itertools
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from cruxy_control import Controls, Signals
from cruxy_control.controls import DRIVEN, STEERED, neutral
from cruxy_control.filters import MAX_COUNT
from cruxy_control.law import needs_alignment, short, steers_decay
from cruxy_control.signals import NOT_KNOWN
from cruxy_torch import _scalar_numpy
from cruxy_torch._kept import assign

KEY = "controller"
"""The name of this dictionary in the first parameter group."""

FORMAT = 2
"""Version of the layout of this dictionary and of the state beside the parameters."""

REPORT = (
    "learning_rate", "phase", "curvature", "beta1", "beta2", "clip_threshold", "clip_scale",
    "meta_scale", "phase_scale", "warning", "alignment", "grad_norm", "gamma_norm", "loss", "ok",
)  # fmt: skip
"""What the last step measured and decided: the order of the vector `law_state["report"]`."""

CONTROLS = (*(n for n in Controls._fields if n not in ("ok", *STEERED, *DRIVEN)), *STEERED)
"""What the law ordered on the last good step: the order of `law_state["controls"]`, which ends
before `STEERED` where the law orders none of it. What is in `DRIVEN` orders no later step."""

APPLIED = ("limit_scale", "base_rate")
"""What became of the rate in the step before, for a law with a true `needs_alignment`."""

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


def namespace(law_state: dict[str, Tensor]) -> Any:
    """What the law of this state runs on.

    NumPy's scalars, on the very same bytes, where they lie on the CPU: an operation costs a tenth
    of torch's there. torch on other devices and where a compiler looks on.
    """
    device = law_state["step"].device
    if device.type == "cpu" and not torch.compiler.is_compiling():
        return _scalar_numpy
    return Namespace(device)


def start(law: Any, device: torch.device) -> dict[str, Tensor]:
    """The state before the first step."""
    like = torch.zeros((), dtype=torch.float32, device=device)
    state = law.init(like, xp=torch)
    names = leaves(names_of(state))
    law_state = {name: leaf.clone() for name, leaf in zip(names, leaves(state), strict=True)}
    for name in COUNTERS:
        law_state[name] = torch.zeros((), dtype=torch.int32, device=device)
    if needs_alignment(law):
        law_state["limit_scale"] = torch.ones((), dtype=torch.float32, device=device)
        law_state["base_rate"] = torch.zeros((), dtype=torch.float32, device=device)
        law_state["driven"] = torch.full(
            (len(DRIVEN),), NOT_KNOWN, dtype=torch.float32, device=device
        )
    first = neutral(torch.ones_like(like, dtype=torch.bool), xp=torch)
    kept = CONTROLS if steers_decay(law) else CONTROLS[: -len(STEERED)]
    ordered = torch.stack([getattr(first, name) for name in kept])
    law_state["controls"] = ordered.clip(max=NOT_KNOWN)
    law_state["report"] = torch.full((len(REPORT),), NOT_KNOWN, dtype=torch.float32, device=device)
    law_state["format"] = torch.full((), FORMAT, dtype=torch.int32, device=device)
    return law_state


def advance(
    law: Any, names: Any, law_state: dict[str, Tensor], signals: Signals, *, still: Any = False
) -> Controls:
    """One step of the law; updates its state in place and returns what it decided.

    Args:
        law: the law.
        names: those of its state, as `names_of` gives them.
        law_state: the state.
        signals: what was measured.
        still: whether this is no step at all, and so neither counts nor is skipped.

    Returns:
        Scalars of `namespace(law_state)`.
    """
    xp = namespace(law_state)
    values = dict(zip(law_state, as_scalars(law_state.values(), xp), strict=True))
    with quiet(xp):
        sensed = Signals(*as_scalars(signals, xp))
        new, controls = advanced(law, names, values, sensed, still=still, xp=xp)
    store(law_state, new, controls, xp)
    return controls


def advanced(
    law: Any, names: Any, values: Mapping[str, Any], signals: Signals, *, still: Any, xp: Any
) -> tuple[dict[str, Any], Controls]:
    """What changes in a state in one step of the law, by name, and what it decided.

    Args:
        law: the law.
        names: see `advance`.
        values: the state as scalars of `xp`.
        signals: likewise.
        still: see `advance`.
        xp: the controller's namespace.
    """
    if still is not False:  # what is not finite leaves a law as it was
        signals = signals._replace(grad_norm=xp.where(still, math.nan, signals.grad_norm))
    state, controls = law.step(restored(names, values), signals, xp=xp)
    good = xp.where(controls.ok, xp.ones_like(values["step"]), 0)
    bad = 1 - good if still is False else xp.where(still, 0, 1 - good)
    new = dict(zip(leaves(names), leaves(state), strict=True))
    new["step"] = _counted(values["step"], good, xp)
    new["skipped_total"] = _counted(values["skipped_total"], bad, xp)
    in_a_row = _counted(values["skipped_in_a_row"], bad, xp)
    new["skipped_in_a_row"] = in_a_row * (1 - good)
    return new, controls


def store(law_state: dict[str, Tensor], new: dict[str, Any], controls: Controls, xp: Any) -> None:
    """Keeps what `advanced` gave."""
    if xp is _scalar_numpy:
        for name, value in new.items():
            law_state[name].numpy()[...] = value
    else:
        assign([law_state[name] for name in new], list(new.values()))
    _hold(law_state["controls"], controls, xp)


def _counted(count: Any, more: Any, xp: Any) -> Any:
    """A counter, at its largest rather than wrapped round."""
    return xp.where(count < MAX_COUNT, count + more, count)


def last_controls(law_state: dict[str, Tensor]) -> Controls:
    """What the law ordered on the last good step; before the first, what changes nothing."""
    xp = namespace(law_state)
    vector = law_state["controls"]
    values = vector.numpy() if xp is _scalar_numpy else vector.unbind()
    ok = (
        numpy.True_
        if xp is _scalar_numpy
        else torch.ones((), dtype=torch.bool, device=vector.device)
    )
    return Controls(ok=ok, **dict(zip(CONTROLS, values, strict=False)))


def _hold(vector: Tensor, controls: Controls, xp: Any) -> None:
    values = to_hold(controls, vector.shape[0], xp=xp)
    if xp is not _scalar_numpy:
        vector.copy_(torch.where(controls.ok, torch.stack(values), vector))
    elif controls.ok:
        vector.numpy()[...] = values


def to_hold(controls: Controls, count: int, *, xp: Any) -> list[Any]:
    """What is kept of the orders of a good step: the first so many of `CONTROLS`."""
    threshold = xp.clip(controls.clip_threshold, 0.0, NOT_KNOWN)  # no threshold is a finite number
    controls = controls._replace(clip_threshold=threshold)
    return [getattr(controls, name) for name in CONTROLS[:count]]


def as_scalars(values: Iterable[Any], xp: Any) -> list[Any]:
    """Tensors as what a law computes with in `xp`; numbers as they are."""
    if xp is not _scalar_numpy:
        return list(values)
    # [()] turns a 0-d array into a scalar, which computes several times faster.
    return [v.numpy()[()] if isinstance(v, Tensor) else v for v in values]


def quiet(xp: Any) -> contextlib.AbstractContextManager[Any]:
    """Keeps NumPy from warning of what the other namespaces compute in silence."""
    return numpy.errstate(all="ignore") if xp is _scalar_numpy else contextlib.nullcontext()


def in_first(groups: Sequence[dict[str, Any]], law_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state in the first group; this one, where the group that held it was taken out or moved.

    Args:
        groups: of the optimizer.
        law_state: its state, which goes there.
    """
    if not groups:
        return law_state
    if KEY not in groups[0]:
        for group in groups:
            group.pop(KEY, None)
        groups[0][KEY] = law_state
    return groups[0][KEY]


def check_form(saved: Any) -> None:
    """Raises unless this is the state of a controller in the format of this version.

    Raises:
        ValueError: where it is none, or one of another format.
    """
    tensors = isinstance(saved, Mapping) and all(isinstance(v, Tensor) for v in saved.values())
    if not tensors:
        got = "none" if saved is None else reprlib.repr(saved)
        raise ValueError(
            f'the state must hold param_groups[0]["controller"], tensors by name, got {got}; '
            "only what CruxyOptimizer.state_dict() gave can be loaded."
        )
    if int(saved.get("format", 0)) != FORMAT:
        raise ValueError(
            f"the controller's format must be {FORMAT}, got {int(saved.get('format', 0))}; "
            "load it with the version of cruxy_torch that saved it."
        )


def check(law_state: dict[str, Tensor], saved: Mapping[str, Tensor], law: Any) -> None:
    """Raises unless a saved state fits this one.

    Args:
        law_state: of the optimizer.
        saved: what is to be loaded, see `check_form`.
        law: of the optimizer.

    Raises:
        ValueError: where it is of another law or another length.
    """
    differ = {
        "lacks": _parts(law_state, saved),
        "has besides": _parts(saved, law_state),
    }
    got = " and ".join(f"{side} {', '.join(parts)}" for side, parts in differ.items() if parts)
    if got:
        raise ValueError(
            f"the saved controller must belong to the same law as this one, {short(law)}, got one "
            f"that {got}; build the optimizer with the mode or law it was saved with."
        )
    for name, tensor in law_state.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(
                f"{name} must have shape {tuple(tensor.shape)}, got {tuple(saved[name].shape)}; "
                "build the optimizer with the law it was saved with."
            )


def _parts(state: Iterable[str], other: Iterable[str]) -> list[str]:
    """The largest parts of a state, by the names of its values, of which another has nothing."""
    theirs = {part for name in other for part in _around(name)}
    found = (next((p for p in _around(name) if p not in theirs), None) for name in state)
    return sorted({part.removeprefix("law.") for part in found if part is not None})


def _around(name: str) -> Iterable[str]:
    """The parts in which a value lies, from the largest to itself."""
    return itertools.accumulate(name.split("."), "{}.{}".format)


def load(law_state: dict[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copies a checked state into this one, whose tensors and device stay."""
    for name, tensor in law_state.items():
        tensor.copy_(saved[name])


def names_of(state: Any, prefix: str = "law.") -> Any:
    """A state of the law with the name of each value in the dictionary in its place."""
    fields = zip(state._fields, state, strict=True)
    return type(state)(
        *(names_of(v, f"{prefix}{k}.") if isinstance(v, tuple) else prefix + k for k, v in fields)
    )


def restored(names: Any, law_state: Mapping[str, Any]) -> Any:
    """The law's state with the values that the dictionary has under `names`."""
    return type(names)(
        *[restored(n, law_state) if isinstance(n, tuple) else law_state[n] for n in names]
    )


def leaves(state: Any) -> list[Any]:
    """What a nested NamedTuple holds, in order."""
    flat = []
    for value in state:
        if isinstance(value, tuple):
            flat += leaves(value)
        else:
            flat.append(value)
    return flat
