"""One step on the device: measure, ask the law, update. Nothing here reads a value on the host."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_control import Controls, Law, Signals, meta_learning_rate
from cruxy_control import betas as controlled_betas
from cruxy_control.controls import clip_scale
from cruxy_control.formulas.averaging import averaging_weight
from cruxy_control.formulas.limits import RELATIVE_FLOOR, rate_share, relative_limit
from cruxy_control.law import needs_alignment, steers_decay
from cruxy_control.signals import NOT_KNOWN
from cruxy_exact.random_bits import stream_key
from cruxy_torch import _law_state, _telemetry
from cruxy_torch._kept import Kept
from cruxy_torch._native.fit import Passes
from cruxy_torch._orders import Orders
from cruxy_torch._sensors.measure import measure
from cruxy_torch._sensors.sizes import Sizes, sizes_by_group, whole_mean_square


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an optimizer fixes for all its groups.

    Attributes:
        law: the control law.
        names: of the values in its state, see `_law_state.names_of`.
        lr_bounds: absolute bounds on each rate before the phase factor.
        max_grad_norm: the largest norm of what is left of a gradient, whatever the law allows;
            `None` for no such bound.
    """

    law: Law
    names: Any
    lr_bounds: tuple[float, float] | None
    max_grad_norm: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group(abc.ABC):
    """One parameter group's part in a step, as far as the loop knows it.

    Attributes:
        index: of the group.
        grads: the gradients there are, a `DTensor` where the parameter is one.
        lr: the user's learning rate.
        b1: the user's decay rate of the first moment; 0 for none.
        b2: the user's decay rate of the second moment; 0 for none.
        maximize: climbs instead of descending.
        averaging: power of the average of the parameters; `None` for none.
        relative_limit: no tensor's rate is above this share of its size, or of that of all tensors;
            `None` for no limit.
        still: whether nothing of it moved in the step before, whose rate was 0.
    """

    index: int
    grads: list[Tensor]
    lr: float | Tensor
    b1: float | Tensor
    b2: float | Tensor
    maximize: bool
    averaging: float | None
    relative_limit: float | None
    still: bool

    @property
    @abc.abstractmethod
    def rounds(self) -> bool:
        """Whether anything of it may be rounded by chance."""

    @abc.abstractmethod
    def momenta(self) -> Sequence[Kept]:
        """The first moment that belongs to each gradient, this rank's shards of them."""

    @abc.abstractmethod
    def limited(self) -> Sequence[Tensor]:
        """Every tensor that a relative limit bounds; none for no limit."""

    @abc.abstractmethod
    def update(self, orders: Orders, *, native: Passes | None, foreach: bool) -> None:
        """Updates parameters, state and averages in place.

        Args:
            orders: what the controller decided.
            native: a library that takes what it can take; `None` for none.
            foreach: takes torch's foreach calls for the rest.
        """


def run(
    settings: Settings,
    law_state: dict[str, Tensor],
    groups: Sequence[Group],
    loss: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    process_group: dist.ProcessGroup | None,
    *,
    native: Passes | None,
    foreach: bool,
) -> None:
    """One step of everything, in place.

    Args:
        settings: see there.
        law_state: see `_law_state`.
        groups: what has a gradient, by parameter group.
        loss: float32, 0-d, NaN where there is none.
        grad_scale: what the gradients have been multiplied with; `None` for nothing.
        found_inf: positive where a `GradScaler` wants the step skipped.
        process_group: see `_sensors.measure`.
        native: a library that takes what it can take; `None` for none.
        foreach: takes torch's foreach calls for the rest.
    """
    device = law_state["step"].device
    one = torch.ones((), dtype=torch.float32, device=device)
    scale = one if grad_scale is None else grad_scale.to(device).double().reciprocal().float()
    grads = [g for group in groups for g in group.grads]
    momenta = None
    if needs_alignment(settings.law):
        momenta = [steering for group in groups for steering in _steering(group)]
    signals = measure(
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
        signals = signals._replace(**{name: law_state[name] for name in _law_state.APPLIED})
    key = random_key(law_state) if any(group.rounds for group in groups) else 0
    xp = _law_state.namespace(law_state)
    still: Any = False
    if all(is_zero(group.lr) for group in groups):
        # A tool that makes an optimizer fill its state steps so, and does not mean a step.
        (norm,) = _law_state.as_scalars([signals.grad_norm], xp)
        still = norm == 0.0
    controls = _law_state.advance(settings.law, settings.names, law_state, signals, still=still)
    controls = with_largest_norm(controls, signals.grad_norm, settings, xp=xp)
    ordered = [orders_of(group, controls, scale, key, settings, xp=xp) for group in groups]
    record(law_state, signals, controls, ordered[0], still=still)
    (count,) = _law_state.as_scalars([law_state["step"]], xp)
    sizes = sizes_by_group([group.limited() for group in groups], native=native)
    whole = whole_mean_square([size for size in sizes if size is not None])
    shares = []
    for group, orders, size in zip(groups, ordered, sizes, strict=True):
        orders = with_limits(group, orders, count - 1, size, whole, controls.limit_factor, xp=xp)
        if momenta is not None and group.grads:
            shares.append(_share(orders, device))
        group.update(orders, native=native, foreach=foreach)
    if momenta is not None:
        share = torch.stack(shares).max() if shares else torch.zeros_like(one)
        ok = torch.as_tensor(controls.ok, device=device)
        base = [torch.as_tensor(g.lr, dtype=torch.float32, device=device) for g in groups]
        now = (share, torch.stack(base).max())
        for name, value in zip(_law_state.APPLIED, now, strict=True):
            law_state[name].copy_(torch.where(ok, value, law_state[name]))


def orders_of(
    group: Group, controls: Controls, scale: Tensor, key: Any, settings: Settings, *, xp: Any
) -> Orders:
    """What a group applies to its gradients.

    Args:
        group: with the user's rate and betas.
        controls: what the law ordered.
        scale: factor on the gradients besides clipping; 0-d.
        key: from `random_key`.
        settings: see there.
        xp: the controller's namespace.
    """
    lr, b1, b2, factor = _law_state.as_scalars((group.lr, group.b1, group.b2, scale), xp)
    beta1, beta2 = controlled_betas(controls, b1, b2, xp=xp)
    rate = meta_learning_rate(controls, lr, settings.lr_bounds, xp=xp) * controls.phase_scale
    factor = controls.clip_scale * factor
    factor = -factor if group.maximize else factor
    return Orders(
        rate,
        beta1,
        beta2,
        factor,
        controls.ok,
        key,
        sign_weight=controls.sign_weight,
        decay_scale=controls.decay_scale if steers_decay(settings.law) else None,
    )


def with_largest_norm(controls: Controls, norm: Any, settings: Settings, *, xp: Any) -> Controls:
    """What the law ordered, with `settings.max_grad_norm` in front of its own clipping.

    Args:
        controls: what the law ordered.
        norm: of the gradient; a scalar.
        settings: see there.
        xp: the controller's namespace.
    """
    largest = settings.max_grad_norm
    if largest is None:
        return controls
    (norm,) = _law_state.as_scalars([norm], xp)
    threshold = xp.clip(controls.clip_threshold, 0.0, largest)
    factor = xp.minimum(controls.clip_scale, clip_scale(largest, norm, xp=xp))
    factor = xp.where(controls.ok, factor, controls.clip_scale)
    return controls._replace(clip_threshold=threshold, clip_scale=factor)


def with_limits(
    group: Group,
    orders: Orders,
    count: Any,
    sizes: Sizes | None,
    whole: Tensor | None,
    factor: Any = 1.0,
    *,
    xp: Any,
) -> Orders:
    """What a group applies, with the limits of its tensors and the weight in their averages.

    Args:
        group: see there.
        orders: from `orders_of`.
        count: good steps before this one.
        sizes: of the group's tensors.
        whole: the mean square of all tensors under a limit; `None` where there is none.
        factor: the law's on the limit.
        xp: the controller's namespace.
    """
    weight, limits = orders.average_weight, None
    if group.averaging is not None:
        count = count.to(torch.float32) if isinstance(count, Tensor) else count * 1.0
        weight = averaging_weight(count, group.averaging, xp=xp)
        weight = xp.where(orders.ok, weight, 0.0)
    if sizes is not None and whole is not None:
        squares, limit = sizes.mean_squares, group.relative_limit
        factor = factor.to(squares.device) if isinstance(factor, Tensor) else float(factor)
        limit, whole = limit * factor, whole.to(squares.device)
        limits = relative_limit(squares, limit, RELATIVE_FLOOR, xp=torch, whole=whole)
    return orders._replace(limits=limits, average_weight=weight)


def is_zero(lr: float | Tensor) -> bool:
    """Whether a learning rate is known to be 0 without waiting for a device."""
    if isinstance(lr, Tensor) and (torch.compiler.is_compiling() or not lr.is_cpu):
        return False
    return float(lr) == 0.0


def _steering(group: Group) -> list[tuple[Kept, float] | None]:
    """The first moment of each gradient with its sign; `None` where nothing has moved."""
    sign = -1.0 if group.maximize else 1.0
    return [None if group.still else (moment, sign) for moment in group.momenta()]


def _share(orders: Orders, device: torch.device) -> Tensor:
    """What a limit left of the rate of a group, see `Signals.limit_scale`."""
    largest = None if orders.limits is None else orders.limits.max().to(device)
    rate = torch.as_tensor(orders.rate, dtype=torch.float32, device=device)
    return rate_share(largest, rate, xp=torch)


def random_key(law_state: dict[str, Tensor]) -> Any:
    """The key of a step's random bits, another for every step; an int32 scalar."""
    xp = _law_state.namespace(law_state)
    counters = [law_state["step"], law_state["skipped_total"]]
    count, skipped = _law_state.as_scalars(counters, xp)
    with _law_state.quiet(xp):
        return stream_key(count + skipped, 0, 0, xp=xp)


def record(
    law_state: dict[str, Tensor],
    signals: Signals,
    controls: Controls,
    first: Orders,
    *,
    still: Any = False,
) -> None:
    """Keeps the telemetry; rate and betas are the first group's."""
    xp = _law_state.namespace(law_state)
    (loss,) = _law_state.as_scalars([signals.loss], xp)
    values = signals._asdict() | controls._asdict()
    # A state without a loss or a threshold is not to look damaged.
    values["loss"] = xp.where(xp.isfinite(loss), loss, NOT_KNOWN)
    values["clip_threshold"] = xp.clip(controls.clip_threshold, 0.0, NOT_KNOWN)
    values |= {"learning_rate": first.rate, "beta1": first.beta1, "beta2": first.beta2}
    _telemetry.record(law_state, values, still=still)
