"""One step on the device: measure, ask the law, update. Nothing here reads a value on the host."""

import dataclasses
from typing import Any, NamedTuple

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_control import Controls, Law, Signals, meta_learning_rate
from cruxy_control import betas as controlled_betas
from cruxy_torch import _controller, _kernels, _native, _sensors
from cruxy_torch._kernels import Options, Scalars, Tensors


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an optimizer fixes for all its groups.

    Attributes:
        law: the control law.
        template: a state of it, for its structure.
        lr_bounds: absolute bounds on each rate before the phase factor.
        momentum_dtype: of first moments; `None` for each parameter's own, float32 for float16.
        power: the bias correction of `cruxy` 2.1.0, see `Options`.
    """

    law: Law
    template: Any
    lr_bounds: tuple[float, float] | None
    momentum_dtype: torch.dtype | None
    power: bool


@dataclasses.dataclass(frozen=True)
class Group:
    """One parameter group's part in a step; `lr`, `b1` and `b2` are the user's."""

    tensors: Tensors
    options: Options
    lr: float | Tensor
    b1: float | Tensor
    b2: float | Tensor
    maximize: bool


def run(
    settings: Settings,
    memory: dict[str, Tensor],
    groups: list[Group],
    loss: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    process_group: dist.ProcessGroup | None,
    native: bool,
    foreach: bool,
) -> None:
    """One step of everything, in place.

    Args:
        settings: see there.
        memory: the controller's, see `_controller`.
        groups: what has a gradient, by parameter group.
        loss: float32, 0-d, NaN where there is none.
        grad_scale: what the gradients have been multiplied with; `None` for nothing.
        found_inf: positive where a `GradScaler` wants the step skipped.
        process_group: see `_sensors.measure`.
        native: takes the C library for what it can take.
        foreach: takes torch's foreach calls for the rest.
    """
    device = memory["step"].device
    one = torch.ones((), device=device)
    scale = one if grad_scale is None else grad_scale.to(device).double().reciprocal().float()
    grads = [g for group in groups for g in group.tensors.grads]
    signals = _sensors.measure(
        grads,
        loss,
        settings.law.gamma,
        scale=scale,
        found_inf=found_inf,
        process_group=process_group,
        native=native,
        foreach=foreach,
    )
    controls = _controller.advance(settings.law, settings.template, memory, signals)
    xp = _controller.namespace(memory)
    applied = [_scalars(group, controls, settings, xp) for group in groups]
    for group, scalars in zip(groups, applied, strict=True):
        _update(group, _tensors(scalars, scale, group.maximize), native=native, foreach=foreach)
    _report(memory, signals, controls, applied[0])


class Applied(NamedTuple):
    """What a group applies, as scalars of the controller's namespace."""

    rate: Any
    beta1: Any
    beta2: Any
    clip_scale: Any
    ok: Any


def _scalars(group: Group, controls: Controls, settings: Settings, xp: Any) -> Applied:
    lr, b1, b2 = (
        value.numpy() if xp is numpy and isinstance(value, Tensor) else value
        for value in (group.lr, group.b1, group.b2)
    )
    beta1, beta2 = controlled_betas(controls, b1, b2, xp=xp)
    rate = meta_learning_rate(controls, lr, settings.lr_bounds, xp=xp) * controls.phase_scale
    return Applied(rate, beta1, beta2, controls.clip_scale, controls.ok)


def _tensors(applied: Applied, scale: Tensor, maximize: bool) -> Scalars:
    if not isinstance(applied.ok, Tensor):
        numbers = torch.from_numpy(numpy.array(applied[:4], numpy.float32))
        rate, beta1, beta2, clip_scale = numbers.unbind()
        applied = Applied(rate, beta1, beta2, clip_scale, torch.tensor(bool(applied.ok)))
    factor = applied.clip_scale * scale
    scale = -factor if maximize else factor
    return Scalars(applied.rate, applied.beta1, applied.beta2, scale, applied.ok)


def _update(group: Group, scalars: Scalars, *, native: bool, foreach: bool) -> None:
    tensors, options = group.tensors, group.options
    if any(map(_sensors.is_sharded, tensors.grads)):
        if options.centralize:
            _check_centralizable(tensors.grads)
        tensors = Tensors(*([_sensors.local(t) for t in column] for column in tensors))
    by_device: dict[torch.device, list[int]] = {}
    for index, param in enumerate(tensors.params):
        by_device.setdefault(param.device, []).append(index)
    for device, indices in by_device.items():
        part, here = tensors.select(indices), scalars.to(device)
        if native and device.type == "cpu" and not options.power:
            fast, slow = _native.split([column for column in part[:4] if column])
            if fast:
                _native.update(part.select(fast), here, options)
            part = part.select(slow)
        if part.params:
            step = _kernels.foreach if foreach else _kernels.single
            step(part, here, options)


def _check_centralizable(grads: list[Tensor]) -> None:
    for grad in grads:
        if _sensors.is_sharded(grad) and any(
            placement.is_shard() and not placement.is_shard(0) for placement in grad.placements
        ):
            raise ValueError(
                "use_gc needs whole rows on each rank, got a gradient placed as "
                f"{grad.placements}; shard that parameter along its first axis, or give it a "
                "parameter group with use_gc=False."
            )


def _report(
    memory: dict[str, Tensor], signals: Signals, controls: Controls, first: Applied
) -> None:
    """Keeps the telemetry; rate and betas are the first group's."""
    values = {**signals._asdict(), **controls._asdict()}
    values |= {"learning_rate": first.rate, "beta1": first.beta1, "beta2": first.beta2}
    _controller.report(memory, values)
