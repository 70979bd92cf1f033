"""One step on the device: measure, ask the law, update. Nothing here reads a value on the host."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_control.law import needs_alignment, needs_excess
from cruxy_torch._decide import (
    Measured,
    decide,
    order,
    orders_of,
    random_key,
    recorded,
    with_largest_norm,
    with_limits,
)
from cruxy_torch._groups import Group, Settings
from cruxy_torch._kept import Kept
from cruxy_torch._native.fit import Passes
from cruxy_torch._sensors.measure import measure_sums
from cruxy_torch._sensors.sizes import Sizes, sizes_by_group, whole_mean_square

__all__ = [
    "Group", "Measured", "Settings", "decide", "is_zero", "order", "orders_of", "random_key",
    "recorded", "run", "with_largest_norm", "with_limits",
]  # fmt: skip


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
    scale = _unscaled(grad_scale, device, native)
    drives = needs_alignment(settings.law)
    measured = _measured(
        [group for group in groups if group.grads], loss, settings.law.gamma, drives=drives,
        exceeds=needs_excess(settings.law), scale=scale, found_inf=found_inf,
        process_group=process_group, native=native, foreach=foreach,
    )  # fmt: skip
    measured = measured._replace(idle=all(is_zero(group.lr) for group in groups))
    ordered = None if native is None else native.decide(settings, law_state, groups, measured)
    if ordered is None:
        ordered = order(settings, law_state, groups, measured)
    for group, orders in zip(groups, ordered, strict=True):
        group.update(orders, native=native, foreach=foreach)


def _measured(
    groups: Sequence[Group],
    loss: Tensor,
    gamma: float,
    *,
    drives: bool,
    exceeds: bool,
    scale: Tensor,
    native: Passes | None,
    **how: Any,
) -> Measured:
    """Sums over the gradients of all groups, and the sizes of what is under a limit."""
    grads = [grad for group in groups for grad in group.grads]
    momenta = [one for group in groups for one in _steering(group)] if drives else None
    averaged = _averaged(groups) if exceeds else None
    limited = [group.limited() for group in groups]
    together = None
    if native is not None:
        sized = [tensor for group in limited for tensor in group] if all(limited) else []
        together = native.together(grads, sized)
    total, loss = measure_sums(
        grads, loss, gamma, momenta=momenta, averaged=averaged, scale=scale, native=native,
        sized=together, **how,
    )  # fmt: skip
    if together is not None and together.complete:
        lengths = [len(group) for group in limited]
        sizes = [Sizes(*one) for one in together.split(lengths)]
        return Measured(total, loss, scale, sizes, together.whole, float(together.elements))
    sizes = sizes_by_group(limited, native=native)
    whole = whole_mean_square([size for size in sizes if size is not None])
    return Measured(total, loss, scale, sizes, whole)


def _unscaled(grad_scale: Tensor | None, device: torch.device, native: Passes | None) -> Tensor:
    """The factor that takes a loss scale off the gradients."""
    if grad_scale is not None:
        return grad_scale.to(device).double().reciprocal().float()
    if native is not None:
        return native.one(device)
    return torch.ones((), dtype=torch.float32, device=device)


def is_zero(lr: float | Tensor) -> bool:
    """Whether a learning rate is known to be 0 without waiting for a device."""
    if isinstance(lr, Tensor) and (torch.compiler.is_compiling() or not lr.is_cpu):
        return False
    return float(lr) == 0.0


def _steering(group: Group) -> list[tuple[Kept, float] | None]:
    """The first moment of each gradient with its sign; `None` where nothing has moved."""
    sign = -1.0 if group.maximize else 1.0
    return [None if group.still else (moment, sign) for moment in group.momenta()]


def _averaged(groups: Sequence[Group]) -> list[tuple[Kept, Kept] | None] | None:
    """The parameter of each gradient with its average, `None` where there is none; `None` of none.

    Neither where a group climbs: the law reads a loss that falls.
    """
    pairs: list[tuple[Kept, Kept] | None] = []
    for group in groups:
        own = group.averaged()
        pairs += [None for _ in group.grads] if own is None else own
    climbs = any(group.maximize for group in groups)
    return None if climbs or all(pair is None for pair in pairs) else pairs
