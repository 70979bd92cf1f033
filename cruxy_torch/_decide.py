"""From what was measured to what is ordered: all of a step that is computed on scalars.

Written over an array namespace, as the law is: on the CPU it runs on NumPy's scalars, elsewhere on
tensors, and on a tape of `_native.triton_tape`, which makes one kernel of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cruxy_control import Controls, Signals, meta_learning_rate
from cruxy_control import betas as controlled_betas
from cruxy_control.controls import clip_scale, falls
from cruxy_control.formulas.averaging import averaging_orders
from cruxy_control.formulas.limits import RELATIVE_FLOOR, rate_share, relative_limit
from cruxy_control.law import steers_decay
from cruxy_control.signals import NOT_KNOWN
from cruxy_exact.random_bits import stream_key
from cruxy_torch import _law_state, _telemetry
from cruxy_torch._groups import Group, Settings
from cruxy_torch._orders import Orders, scalar
from cruxy_torch._sensors.measure import signals
from cruxy_torch._sensors.sizes import Sizes, factors_of


class Measured(NamedTuple):
    """What was measured for a step.

    Attributes:
        total: the sums that `signals` takes.
        loss: float32, 0-d.
        scale: factor on every gradient besides clipping; float32, 0-d.
        sizes: of the tensors of each group that has gradients; `None` of one without a limit.
        whole: the mean square of all tensors under a limit, times `parts`; `None` of none.
        parts: see `whole`.
        idle: whether every rate is known to be 0.
    """

    total: Any
    loss: Any
    scale: Any
    sizes: Sequence[Sizes | None] = ()
    whole: Any = None
    parts: Any = 1.0
    idle: bool = False


class Decided(NamedTuple):
    """What a step changes in the controller and applies to the groups.

    Attributes:
        state: the new values in the law's state, by name.
        controls: what the law ordered.
        report: what was measured and decided, by name.
        still: whether this was no step.
        orders: of each group.
    """

    state: dict[str, Any]
    controls: Controls
    report: dict[str, Any]
    still: Any
    orders: list[Orders]


def decide(
    settings: Settings,
    values: Mapping[str, Any],
    groups: Sequence[Group],
    measured: Measured,
    *,
    xp: Any,
    vectors: Any,
) -> Decided:
    """From the sums of a step to its orders: all that is computed on scalars, on any namespace.

    Args:
        settings: see there.
        values: the law's state as scalars of `xp`.
        groups: by which `measured` has its sizes, less those without gradients.
        measured: see there.
        xp: the controller's namespace.
        vectors: that of sums and sizes.
    """
    sensed = signals(measured.total, measured.loss, settings.law.gamma, xp=vectors)
    if "limit_scale" in values:
        sensed = sensed._replace(**{name: values[name] for name in _law_state.APPLIED})
    sensed = Signals(*_law_state.as_scalars(sensed, xp))
    key = random_key(values, xp=xp) if any(group.rounds for group in groups) else 0
    still: Any = False
    if measured.idle:
        # A tool that makes an optimizer fill its state steps so, and does not mean a step.
        still = sensed.grad_norm == 0.0
    law, names = settings.law, settings.names
    state, raw = _law_state.advanced(law, names, values, sensed, still=still, xp=xp)
    controls = with_largest_norm(raw, sensed.grad_norm, settings, xp=xp)
    ordered = [orders_of(g, controls, measured.scale, key, settings, xp=xp) for g in groups]
    report = recorded(sensed, controls, ordered[0], xp=xp)
    sizes = iter(measured.sizes)
    for index, group in enumerate(groups):
        own = next(sizes) if group.grads else None
        ordered[index] = with_limits(
            group, ordered[index], state["step"] - 1, own, measured.whole, controls.limit_factor,
            falling=falls(controls), parts=measured.parts, xp=xp, vectors=vectors,
        )  # fmt: skip
    if "limit_scale" in values:
        state |= _applied(groups, ordered, values, controls.ok, xp=xp, vectors=vectors)
    return Decided(state, raw, report, still, ordered)


def _applied(
    groups: Sequence[Group],
    ordered: Sequence[Orders],
    values: Mapping[str, Any],
    ok: Any,
    *,
    xp: Any,
    vectors: Any,
) -> dict[str, Any]:
    """What becomes of the rate in this step, see `_law_state.APPLIED`."""
    share = rate = zero = xp.zeros_like(values["base_rate"])
    for group, orders in zip(groups, ordered, strict=True):
        (lr,) = _law_state.as_scalars([group.lr], xp)
        rate = xp.maximum(rate, zero + lr)
        if group.grads:
            (own,) = _law_state.as_scalars([_share(orders, vectors)], xp)
            share = xp.maximum(share, own)
    now = dict(zip(_law_state.APPLIED, (share, rate), strict=True))
    return {name: xp.where(ok, value, values[name]) for name, value in now.items()}


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
    falling: Any = False,
    parts: Any = 1.0,
    xp: Any,
    vectors: Any = torch,
) -> Orders:
    """What a group applies, with the limits of its tensors and the weight in their averages.

    Args:
        group: see there.
        orders: from `orders_of`.
        count: good steps before this one.
        sizes: of the group's tensors.
        whole: the mean square of all tensors under a limit, times `parts`; `None` of none.
        factor: the law's on the limit.
        falling: whether the rate falls.
        parts: see `whole`.
        xp: the controller's namespace.
        vectors: that of sizes.
    """
    weight, pull, limits = orders.average_weight, None, None
    if group.averaging is not None:
        count = count.to(xp.float32) if hasattr(count, "to") else count * 1.0
        weight, pull = averaging_orders(count, group.averaging, group.interpolation, falling, xp=xp)
        weight = xp.where(orders.ok, weight, 0.0)
        if pull is not None:  # a group whose rate is 0 stands still
            pull = xp.where(orders.rate > 0.0, pull, 0.0)
    if sizes is not None and whole is not None:
        squares, limit = sizes.mean_squares, group.relative_limit
        if vectors is torch:
            factor = factor.to(squares.device) if isinstance(factor, Tensor) else float(factor)
            whole = whole.to(squares.device)
        whole = whole if isinstance(parts, float) and parts == 1.0 else whole / parts
        shares: Any = group.limit_shares
        if shares is not None and vectors is torch:
            shares = factors_of(shares, squares)
        limits = relative_limit(
            *(squares, limit * factor, RELATIVE_FLOOR), xp=vectors, whole=whole, share=shares
        )
    return orders._replace(limits=limits, average_weight=weight, average_pull=pull)


def _share(orders: Orders, vectors: Any) -> Any:
    """What a limit left of the rate of a group, see `Signals.limit_scale`."""
    largest = None if orders.limits is None else orders.limits.max()
    rate = orders.rate
    if vectors is torch:
        rate = scalar(rate, torch.float32)
        largest = None if largest is None else largest.to(rate.device)
    return rate_share(largest, rate, xp=vectors)


def random_key(values: Mapping[str, Any], *, xp: Any) -> Any:
    """The key of a step's random bits, another for every step; an int32 scalar.

    Args:
        values: the law's state as scalars of `xp`.
        xp: the controller's namespace.
    """
    return stream_key(values["step"] + values["skipped_total"], 0, 0, xp=xp)


def recorded(sensed: Signals, controls: Controls, first: Orders, *, xp: Any) -> dict[str, Any]:
    """The telemetry by name; rate and betas are the first group's.

    Args:
        sensed: scalars of `xp`.
        controls: likewise.
        first: likewise.
        xp: the controller's namespace.
    """
    values = sensed._asdict() | controls._asdict()
    # A state without a loss or a threshold is not to look damaged.
    values["loss"] = xp.where(xp.isfinite(sensed.loss), sensed.loss, NOT_KNOWN)
    values["clip_threshold"] = xp.clip(controls.clip_threshold, 0.0, NOT_KNOWN)
    return values | {"learning_rate": first.rate, "beta1": first.beta1, "beta2": first.beta2}


def order(
    settings: Settings,
    law_state: dict[str, Tensor],
    groups: Sequence[Group],
    measured: Measured,
) -> list[Orders]:
    """What `decide` orders each group; what it changes in the controller is kept."""
    xp = _law_state.namespace(law_state)
    numbers = _law_state.as_scalars(law_state.values(), xp)
    values = dict(zip(law_state, numbers, strict=True))
    with _law_state.quiet(xp):
        decided = decide(settings, values, groups, measured, xp=xp, vectors=torch)
    _law_state.store(law_state, decided.state, decided.controls, xp)
    _telemetry.record(law_state, decided.report, still=decided.still)
    return decided.orders
