"""Which parts of Tiger a group has, and the direction that they make."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from cruxy_control.checks import check_range
from cruxy_control.lora_pid import LoraPid
from cruxy_control.slices import Slices
from cruxy_torch._actuators.axiom import FactoredDirection
from cruxy_torch._actuators.direction import Direction
from cruxy_torch._actuators.directions import Momentum, SignBlend
from cruxy_torch._actuators.lora_pid import BlendByLoraPid
from cruxy_torch._actuators.slices import BalanceSlices, ScaleSlices
from cruxy_torch._actuators.trust import AdaptiveGradientClip, ClipRms, TrustRatio

_NEVER = sys.maxsize
"""Elements along an axis from which on a second moment is factored, where it never is."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """Which parts are around the blend, with their constants; `None` for what is not.

    Two are never equal, so that any callable may be the blend, one without a hash too.

    Attributes:
        blend: see `Tiger`, and so all that are not named here.
        temperature: of the sign.
        factored: of the second moment before the momentum.
        agc: the clip of the gradient.
        rms: the limit of the direction.
        rms_per: of what.
        trust: the cap of the trust ratio.
        trust_decay: likewise.
        trust_space: where it is measured: `"update"` or `"momentum"`.
        trust_per: of what.
        balance: whether rates of slices are found.
        pid: of LoRA's tensors.
    """

    blend: float | Callable[[Tensor], Any]
    temperature: float
    factored: FactoredDirection | None
    agc: float | None
    rms: float | None
    rms_per: Any
    trust: float | None
    trust_decay: float | None
    trust_space: Any
    trust_per: Any
    balance: bool
    pid: LoraPid | None


@functools.lru_cache(maxsize=64)
def direction_of(
    parts: Parts, slices: Slices | None, rates: tuple[float, ...] | None, *, lora: bool
) -> Direction:
    """The direction of a group: the blend, and around it what there is, from the inside out."""
    momentum = Momentum(parts.factored)
    direction: Direction = SignBlend(momentum, parts.temperature, parts.blend)
    trust = None
    if parts.trust is not None:
        per = parts.trust_per if slices is not None or parts.trust_per != "slice" else "tensor"
        trust = functools.partial(
            TrustRatio,
            cap=parts.trust,
            decay=parts.trust_decay,
            per=per,
            slices=slices if per == "slice" else None,
        )
    if trust and parts.trust_space == "momentum":
        direction = trust(direction, space="momentum")
    if parts.agc is not None:
        direction = AdaptiveGradientClip(direction, parts.agc)
    if lora and parts.pid is not None:
        direction = BlendByLoraPid(momentum, parts.pid, parts.temperature)
    if parts.rms is not None:
        direction = ClipRms(direction, parts.rms, per=parts.rms_per)
    if trust and parts.trust_space == "update":
        direction = trust(direction)
    if slices is not None and rates is not None:
        direction = ScaleSlices(direction, slices, dict(zip("qkv", rates, strict=True)))
    if slices is not None and parts.balance:
        direction = BalanceSlices(direction, slices)
    return direction


def second_moment(factored: bool | None, alpha: float | None) -> FactoredDirection | None:
    """What the gradient is divided by; `None` where nothing is asked for."""
    alpha = (1.0 if factored else 0.0) if alpha is None else alpha
    remedy = "1 is the whole root, 0 no preconditioner"
    check_range("precond_alpha", alpha, 0.0, 1.0, remedy=remedy)
    if alpha == 0.0:
        return None
    return FactoredDirection(
        momentum=0.0,
        decay_rate=0.8,
        clip_rms=None,
        relative_step=False,
        streak_boost=1.0,
        snr_floor=0.0,
        min_dim_size_to_factor=_NEVER if factored is False else 32,
        power=alpha,
    )


def cap_of_trust(wanted: bool | None, space: str | None, clip: float | None) -> float | None:
    """The cap of the trust ratio; `None` where there is to be none."""
    if wanted is None:
        wanted = space is not None or clip is not None
    if not wanted:
        return None
    return TrustRatio.cap if clip is None else clip
