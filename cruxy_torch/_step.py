"""One step on the device: measure, ask the law, update. Nothing here reads a value on the host."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_control import Controls, Law, Signals, meta_learning_rate
from cruxy_control import betas as controlled_betas
from cruxy_control.formulas.averaging import averaging_weight
from cruxy_control.formulas.limits import RELATIVE_FLOOR, limit_scale, relative_limit
from cruxy_control.law import needs_alignment
from cruxy_exact.random_bits import stream_key
from cruxy_torch import _law_state as _controller
from cruxy_torch._actuators.apply import Scalars
from cruxy_torch._kept import Kept
from cruxy_torch._sensors import measure as _sensors


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
        averaging: power of the average of the parameters; `None` for none.
        relative_limit: no tensor's rate is above this share of its size, or of that of all tensors;
            `None` for no limit.
    """

    index: int
    grads: list[Tensor]
    lr: float | Tensor
    b1: float | Tensor
    b2: float | Tensor
    maximize: bool
    rounds: bool
    averaging: float | None = None
    relative_limit: float | None = None

    def momenta(self) -> Sequence[Kept]:
        """The first moment that belongs to each gradient, this rank's shards of them."""
        raise TypeError(f"{type(self).__name__} keeps no first moments.")

    def sizes(self, *, native: bool) -> _sensors.Sizes | None:
        """Of every tensor that a relative limit bounds; `None` for no limit.

        Args:
            native: takes the C library for what it can take.
        """
        return None

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
    momenta = None
    if needs_alignment(settings.law):
        momenta = [(m, -1.0 if g.maximize else 1.0) for g in groups for m in g.momenta()]
    signals = _sensors.measure(
        grads,
        loss,
        settings.law.gamma,
        momenta=momenta,
        scale=scale,
        found_inf=found_inf,
        process_group=process_group,
        native=native,
        foreach=foreach,
    )
    if momenta is not None:
        signals = signals._replace(limit_scale=memory["limit_scale"])
    key = random_key(memory) if any(group.rounds for group in groups) else 0
    controls = _controller.advance(settings.law, settings.names, memory, signals)
    xp = _controller.namespace(memory)
    applied = [scalars(group, controls, scale, key, settings, xp=xp) for group in groups]
    report(memory, signals, controls, applied[0])
    (count,) = _controller.scalars([memory["step"]], xp)
    sizes = [group.sizes(native=native) for group in groups]
    whole = _sensors.whole_mean_square([size for size in sizes if size is not None])
    shares = []
    for group, decided, size in zip(groups, applied, sizes, strict=True):
        decided = completed(group, decided, count - 1, size, whole, xp=xp)
        if momenta is not None and group.grads:
            shares.append(one if decided.limits is None else _share(decided).to(device))
        group.update(decided, native=native, foreach=foreach)
    if momenta is not None:
        share = torch.stack(shares).max() if shares else one
        ok = torch.as_tensor(controls.ok, device=device)
        memory["limit_scale"].copy_(torch.where(ok, share, memory["limit_scale"]))


def completed(
    group: Group,
    scalars: Scalars,
    count: Any,
    sizes: _sensors.Sizes | None,
    whole: Tensor | None,
    *,
    xp: Any,
) -> Scalars:
    """What a group applies, with the limits of its tensors and the weight in their averages.

    Args:
        group: see there.
        scalars: from `scalars`.
        count: good steps before this one.
        sizes: of the group's tensors, from `Group.sizes`.
        whole: the mean square of all tensors under a limit; `None` where there is none.
        xp: the controller's namespace.
    """
    weight, limits = scalars.average_weight, None
    if group.averaging is not None:
        weight = averaging_weight(count * 1.0, group.averaging, xp=xp)
        weight = xp.where(scalars.ok, weight, 0.0)
    if sizes is not None and whole is not None:
        squares, limit = sizes.mean_squares, group.relative_limit
        whole = whole.to(squares.device)
        limits = relative_limit(squares, limit, RELATIVE_FLOOR, xp=torch, whole=whole)
    return scalars._replace(limits=limits, average_weight=weight)


def _share(scalars: Scalars) -> Tensor:
    """The largest share of its rate that a limit left any tensor of a group; 1 of a rate of 0."""
    largest, rate = scalars.limits.max(), scalars.rate
    rate = rate.to(largest.device) if isinstance(rate, Tensor) else largest.new_tensor(float(rate))
    return limit_scale(largest, rate, xp=torch)


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
