"""One step on the device: measure, ask the law, update. Nothing here reads a value on the host."""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_control import Controls, Law, Signals, meta_learning_rate
from cruxy_control import betas as controlled_betas
from cruxy_torch import _controller, _kernels, _native, _numpy, _sensors
from cruxy_torch._kernels import Options, Scalars, Tensors


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an optimizer fixes for all its groups.

    Attributes:
        law: the control law.
        names: of the values in its state, see `_controller.names_of`.
        lr_bounds: absolute bounds on each rate before the phase factor.
        momentum_dtype: of first moments; `None` for each parameter's own, float32 for float16.
        power: the bias correction of `cruxy` 2.1.0, see `Options`.
    """

    law: Law
    names: Any
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
    controls = _controller.advance(settings.law, settings.names, memory, signals)
    xp = _controller.namespace(memory)
    applied = [_scalars(group, controls, scale, settings, xp) for group in groups]
    for group, scalars in zip(groups, applied, strict=True):
        _update(group, scalars, native=native, foreach=foreach)
    _report(memory, signals, controls, applied[0])


def _scalars(
    group: Group, controls: Controls, scale: Tensor, settings: Settings, xp: Any
) -> Scalars:
    lr, b1, b2, factor = (
        value.numpy()[()] if xp is _numpy and isinstance(value, Tensor) else value
        for value in (group.lr, group.b1, group.b2, scale)
    )
    beta1, beta2 = controlled_betas(controls, b1, b2, xp=xp)
    rate = meta_learning_rate(controls, lr, settings.lr_bounds, xp=xp) * controls.phase_scale
    factor = controls.clip_scale * factor
    return Scalars(rate, beta1, beta2, -factor if group.maximize else factor, controls.ok)


def _update(group: Group, scalars: Scalars, *, native: bool, foreach: bool) -> None:
    tensors, options = group.tensors, group.options
    if _sensors.any_sharded(tensors.grads):
        if options.centralize:
            _check_centralizable(tensors.grads)
        tensors = Tensors(*([_sensors.local(t) for t in column] for column in tensors))
    if native and tensors.params and not options.power:
        fast, slow = _native.split([column for column in tensors[:4] if column])
        if fast:
            _native.update(tensors.select(fast), scalars, options)
        tensors = tensors.select(slow)
    by_device: dict[torch.device, list[int]] = {}
    for index, param in enumerate(tensors.params):
        by_device.setdefault(param.device, []).append(index)
    step = _kernels.foreach if foreach else _kernels.single
    for device, indices in by_device.items():
        step(tensors.select(indices), scalars.to(device), options)


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
    memory: dict[str, Tensor], signals: Signals, controls: Controls, first: Scalars
) -> None:
    """Keeps the telemetry; rate and betas are the first group's."""
    values = {**signals._asdict(), **controls._asdict()}
    values |= {"learning_rate": first.rate, "beta1": first.beta1, "beta2": first.beta2}
    _controller.report(memory, values)
