"""A blend of sign and momentum, and a clip, that two PID loops a tensor steer: Tiger's for LoRA."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from cruxy_control.checks import check_range
from cruxy_control.formulas.directions import momentum_share
from cruxy_control.formulas.trust import AGC_EPS
from cruxy_control.lora_pid import LoraPid, LoraPidState, large_share
from cruxy_torch._actuators.direction import Direction
from cruxy_torch._actuators.directions import Momentum, SignBlend, Wrapped
from cruxy_torch._actuators.slices import Part
from cruxy_torch._actuators.staged import Stages, held, root_mean_square, total
from cruxy_torch._actuators.stepped import SteppedTensor
from cruxy_torch._actuators.trust import Clipped, clip_factor
from cruxy_torch._columns import Columns
from cruxy_torch._distributed.shards import local
from cruxy_torch._kept import assign
from cruxy_torch._orders import Orders

_NOT_YET = -1.0
"""The share of large entries before the first good step."""


@dataclasses.dataclass(frozen=True)
class BlendByLoraPid(Wrapped):
    """`AdaptiveGradientClip`, a momentum and `SignBlend`, steered a tensor at a time.

    Each tensor has a `cruxy_control.LoraPid`. What its direction looks like (the share of large
    entries) sets how much of the momentum is blended into the sign, and how long a gradient may be
    for the size of the parameter. Both hold for the step after. It serves every tensor it is given;
    `Tiger(lora_pid=True)` gives it those of LoRA. Of a tensor in several blocks the whole momentum
    and the whole direction are held meanwhile. Nothing measured so far speaks for it.

    The loops lie in `optimizer.state[parameter]["lora_pid"]`, the fields of
    `cruxy_control.LoraPidState` in order.

    Attributes:
        inner: the momentum between clip and blend.
        pid: the loops with their constants.
        temperature: of `SignBlend`, at least 0.
        eps: of `AdaptiveGradientClip`: a parameter's norm counts as at least this, above 0. LoRA's
            B starts at zeros.

    Raises:
        TypeError: where `pid` is no `LoraPid`.
        ValueError: where a number is outside its range.

    Examples:
        >>> import torch
        >>> import cruxy_torch
        >>> b = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = cruxy_torch.CruxyOptimizer(
        ...     [b], lr=1e-2, direction=cruxy_torch.BlendByLoraPid()
        ... )
        >>> b.sum().backward()
        >>> _ = optimizer.step()
        >>> -b.detach() / optimizer.telemetry()["learning_rate"]
        tensor([1., 1.])
    """

    inner: Direction = dataclasses.field(default_factory=Momentum)
    pid: LoraPid = LoraPid()
    temperature: float = 1.0
    eps: float = AGC_EPS

    kind = "lion"  # pyright: ignore[reportAssignmentType]

    def __post_init__(self) -> None:
        if not isinstance(self.pid, LoraPid):
            raise TypeError(
                f"pid must be a LoraPid, got {self.pid!r}; give cruxy_control.LoraPid()."
            )
        remedy = "0 is the sign, 1 is soft below the root mean square"
        check_range("temperature", self.temperature, 0.0, remedy=remedy)
        check_range("eps", self.eps, 0.0, lower_open=True, remedy="keep the default")

    def start(self, state: dict[str, Any], param: Tensor, add: Callable[[str], None]) -> None:
        """Adds what `inner` keeps, the loops, and the last share of large entries."""
        if "lora_pid" not in state:
            zero = torch.zeros((), dtype=torch.float32, device=local(param).device)
            state["lora_pid"] = torch.stack(list(self.pid.init(zero, xp=torch)))
            state["large_share"] = zero + _NOT_YET
        super().start(state, param, add)

    def own_factors(self, columns: Columns, orders: Orders) -> Sequence[Any]:
        """Of each tensor the blend and the clip, after what its last direction looked like."""
        if not columns.states:
            return []
        loops = [state["lora_pid"] for state in columns.states]
        shares = torch.stack([state["large_share"] for state in columns.states])
        # The share of the last good step counts once, in the next: all tensors at a time.
        ok = orders.ok & (shares >= 0.0)
        state = LoraPidState(*torch.stack(loops).unbind(1))
        state, (blends, clips) = self.pid.step(state, shares, ok, xp=torch)
        assign(loops, torch.stack(list(state), dim=1).unbind())
        weights = momentum_share(blends, orders.sign_weight)
        return list(zip(weights.unbind(), clips.unbind(), strict=True))

    def stages(
        self, tensor: SteppedTensor, factors: Any, orders: Orders
    ) -> Stages[Callable[[int], Tensor]]:
        """The blend of the momentum of a clipped gradient."""
        factors, (weight, clip) = factors
        part = Part("tensor")
        scale = yield from clip_factor(tensor, part, clip, self.eps)
        clipped = cast(SteppedTensor, Clipped(tensor, scale, part))
        blend = SignBlend(self.inner, self.temperature)
        momentum = yield from held(self.inner, clipped, factors, orders)
        block = yield from blend.of(momentum, tensor, weight)
        u = [block(number) for number in range(tensor.blocks)]
        rms = yield from root_mean_square(u, tensor)
        large = torch.stack([large_share(x, rms, xp=torch) * x.numel() for x in u]).sum()
        kept = tensor.state["large_share"]
        share = ((yield from total(large)) / max(1, tensor.numel)).to(kept.dtype)
        kept.copy_(torch.where(orders.ok, share, kept))
        return u.__getitem__
