"""One step on the device: measure, ask the law, update. Nothing here reads a value on the host."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_control import Controls, Law, Signals, meta_learning_rate
from cruxy_control import betas as controlled_betas
from cruxy_control.stochastic import stream_key
from cruxy_torch import _controller, _sensors
from cruxy_torch._kernels import Scalars


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an optimizer fixes for all its groups.

    Attributes:
        law: the control law.
        names: of the values in its state, see `_controller.names_of`.
        lr_bounds: absolute bounds on each rate before the phase factor.
    """

    law: Law
    names: Any
    lr_bounds: tuple[float, float] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """One parameter group's part in a step; a subclass says what is updated, and how.

    Attributes:
        index: of the group.
        grads: the gradients there are.
        lr: the user's learning rate.
        b1: the user's decay rate of the first moment; 0 for none.
        b2: the user's decay rate of the second moment.
        maximize: climbs instead of descending.
        rounds: whether anything of it may be rounded by chance.
    """

    index: int
    grads: list[Tensor]
    lr: float | Tensor
    b1: float | Tensor
    b2: float | Tensor
    maximize: bool
    rounds: bool

    def update(self, scalars: Scalars, *, native: bool, foreach: bool) -> None:
        """Updates parameters and state in place.

        Args:
            scalars: what the controller decided.
            native: takes the C library for what it can take.
            foreach: takes torch's foreach calls for the rest.
        """
        raise TypeError(f"{type(self).__name__} must say how it is updated.")


def run(
    settings: Settings,
    memory: dict[str, Tensor],
    groups: Sequence[Group],
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
    grads = [g for group in groups for g in group.grads]
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
    key = random_key(memory) if any(group.rounds for group in groups) else 0
    controls = _controller.advance(settings.law, settings.names, memory, signals)
    xp = _controller.namespace(memory)
    applied = [scalars(group, controls, scale, key, settings, xp=xp) for group in groups]
    for group, decided in zip(groups, applied, strict=True):
        group.update(decided, native=native, foreach=foreach)
    report(memory, signals, controls, applied[0])


def random_key(memory: dict[str, Tensor]) -> Any:
    """The key of a step's random bits, another for every step; an int32 scalar."""
    xp = _controller.namespace(memory)
    count, skipped = _controller.scalars([memory["step"], memory["skipped_total"]], xp)
    with _controller.quiet(xp):
        return stream_key(count + skipped, 0, 0, xp=xp)


def scalars(
    group: Group, controls: Controls, scale: Tensor, key: Any, settings: Settings, *, xp: Any
) -> Scalars:
    """What a group applies to its gradients.

    Args:
        group: with the user's rate and betas.
        controls: what the law ordered.
        scale: factor on the gradients besides clipping; 0-d.
        key: from `random_key`.
        settings: see there.
        xp: the controller's namespace.
    """
    lr, b1, b2, factor = _controller.scalars((group.lr, group.b1, group.b2, scale), xp)
    beta1, beta2 = controlled_betas(controls, b1, b2, xp=xp)
    rate = meta_learning_rate(controls, lr, settings.lr_bounds, xp=xp) * controls.phase_scale
    factor = controls.clip_scale * factor
    return Scalars(rate, beta1, beta2, -factor if group.maximize else factor, controls.ok, key)


def report(memory: dict[str, Tensor], signals: Signals, controls: Controls, first: Scalars) -> None:
    """Keeps the telemetry; rate and betas are the first group's."""
    values = {**signals._asdict(), **controls._asdict()}
    values |= {"learning_rate": first.rate, "beta1": first.beta1, "beta2": first.beta2}
    _controller.report(memory, values)
