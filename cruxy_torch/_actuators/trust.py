"""Steps by the size of what they move: trust ratios, adaptive gradient clipping, limits by rms."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from cruxy_control.checks import check_range
from cruxy_control.formulas import trust as formulas
from cruxy_control.signals import root
from cruxy_control.slices import Slices, check_slices
from cruxy_torch._actuators.direction import Direction
from cruxy_torch._actuators.directions import SignBlend, Wrapped
from cruxy_torch._actuators.moments import advanced
from cruxy_torch._actuators.slices import Part, mean_squares, names_of, parts_of, spread
from cruxy_torch._actuators.staged import Stages, as_it_is, held, side_by_side, stages_of
from cruxy_torch._actuators.stepped import SteppedTensor
from cruxy_torch._columns import Columns
from cruxy_torch._distributed.shards import local, zeros_without
from cruxy_torch._orders import Orders


@dataclasses.dataclass(frozen=True)
class TrustRatio(Wrapped):
    r"""Makes the step of each tensor as long as the tensor itself: LARS' and LAMB's trust ratio.

    $$
    r = \min\left(\text{cap},
    \frac{\max(\lVert \theta \rVert, \text{floor} \sqrt{n})}{\lVert u \rVert}\right),
    \qquad r = 1 \text{ where } u = 0, \qquad
    \hat{r}_t = \exp\frac{\sum_s d^{t-s} \ln r_s}{\sum_s d^{t-s}}
    $$

    With `decay` the direction is multiplied by the average $\hat{r}$ in log space, without it by
    $r$. A step of a rate $\eta$ then moves each tensor by the share $\eta$ of its size. Weight
    decay does not count in $u$. Of a tensor in several blocks the whole direction is held
    meanwhile.

    `python -m benchmarks components` measures what it is worth. Where only the share is to be
    bounded, `relative_limit` does that and leaves the rest alone.

    Attributes:
        inner: the direction.
        cap: the largest ratio, above 0.
        decay: of the average, in `[0, 1)`; `None` for none.
        floor: a root mean square of a parameter counts as at least this, above 0: zeros, as in
            LoRA's B, could never move.
        space: where $u$ is measured: `"update"`, on what `inner` gives; `"momentum"`, on what goes
            into a `SignBlend` before it has its size. The ratio multiplies what comes out. It is
            then one for gradients of this size, unless what is averaged has a size of its own.
        per: `"tensor"`; `"row"`, for every vector along the last axis; `"slice"`, for each slice.
        slices: see `ScaleSlices`; given with `per="slice"` and only then.

    Raises:
        ValueError: where an argument is outside its range, or one comes without the other.

    Examples:
        >>> import torch
        >>> import cruxy_torch
        >>> x, zeros = (torch.nn.Parameter(torch.full((4,), size)) for size in (3.0, 0.0))
        >>> direction = cruxy_torch.TrustRatio(cruxy_torch.SignBlend(), cap=10.0)
        >>> optimizer = cruxy_torch.CruxyOptimizer(
        ...     [x, zeros], lr=0.1, weight_decay=0.0, direction=direction
        ... )
        >>> (x.sum() + zeros.sum()).backward()
        >>> _ = optimizer.step()
        >>> rate = optimizer.telemetry()["learning_rate"]
        >>> (3.0 - x.detach()) / rate, -zeros.detach() / rate
        (tensor([3.0000, 3.0000, 3.0000, 3.0000]), tensor([0.0010, 0.0010, 0.0010, 0.0010]))

    References:
        You et al., [Large Batch Training of Convolutional
        Networks](https://arxiv.org/abs/1708.03888) (LARS), 2017, and [Large Batch Optimization for
        Deep Learning](https://arxiv.org/abs/1904.00962) (LAMB), 2019.
    """

    inner: Direction
    cap: float = formulas.TRUST_CAP
    decay: float | None = None
    floor: float = formulas.TRUST_FLOOR
    space: Literal["update", "momentum"] = "update"
    per: Literal["tensor", "row", "slice"] = "tensor"
    slices: Slices | None = None

    def __post_init__(self) -> None:
        remedy = "10 is a usual value"
        check_range("cap", self.cap, 0.0, math.inf, lower_open=True, remedy=remedy)
        check_range("floor", self.floor, 0.0, lower_open=True, remedy="keep the default")
        if self.decay is not None:
            remedy = "0.9 averages over ten steps, None is no average"
            check_range("decay", self.decay, 0.0, 1.0, upper_open=True, remedy=remedy)
        _check_one_of("space", self.space, ("update", "momentum"))
        _check_one_of("per", self.per, ("tensor", "row", "slice"))
        if (self.per == "slice") != (self.slices is not None):
            raise ValueError(
                "per='slice' and slices come together, got "
                f"per={self.per!r} with slices={self.slices!r}; give both or leave both out."
            )
        if self.space == "momentum" and not isinstance(self.inner, SignBlend):
            raise ValueError(
                "space='momentum' measures what goes into a SignBlend, got "
                f"{type(self.inner).__name__}; put it around that, or use space='update'."
            )

    @property
    def clocks(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of `inner`, and the product of all decays of the average so far."""
        return (*self.inner.clocks, *(("trust_decays",) if self.decay is not None else ()))

    def start(self, state: dict[str, Any], param: Tensor, add: Callable[[str], None]) -> None:
        """Adds what `inner` keeps, and the averages of the logarithms of ratios."""
        if self.slices is not None:
            check_slices("a parameter", self.slices, tuple(param.shape))
        if self.decay is not None and "trust_log" not in state:
            one = torch.ones((), dtype=torch.float32, device=local(param).device)
            state["trust_decays"], state["trust_log"] = one, torch.zeros_like(one)
            if self.slices is not None:
                state["trust_log"] = one.new_zeros(len(names_of(self.slices)))
            elif self.per == "row" and param.ndim > 1:
                state["trust_log"] = zeros_without(param, param.ndim - 1, torch.float32)
        super().start(state, param, add)

    def own_factors(self, columns: Columns, orders: Orders) -> Sequence[Any]:
        """Of each tensor its part, and the product of the decays of its average."""
        parts = parts_of(columns, self.per, self.slices)
        if not columns.states or self.decay is None:
            return [(part, None) for part in parts]
        kept = [state["trust_decays"] for state in columns.states]
        decay = torch.where(orders.ok, torch.full_like(orders.rate, self.decay), 1.0)
        return list(zip(parts, advanced(kept, decay).unbind(), strict=True))

    def stages(
        self, tensor: SteppedTensor, factors: Any, orders: Orders
    ) -> Stages[Callable[[int], Tensor]]:
        """The direction times its ratios."""
        factors, (part, decays) = factors
        if self.space == "momentum" and isinstance(self.inner, SignBlend):
            factors, weight = factors
            measured = yield from held(self.inner.inner, tensor, factors, orders)
            blend: Stages[Any] = self.inner.of(measured, tensor, weight)
        else:
            measured = yield from held(self.inner, tensor, factors, orders)
            blend = as_it_is(measured.__getitem__)
        values = map(tensor.value, range(tensor.blocks))
        squares = (mean_squares(x, tensor, part) for x in (values, measured))
        block, *each = yield from side_by_side(blend, *squares)
        own, step = (root(square, xp=torch) for square in each)
        ratio = formulas.trust_ratio(own, step, self.cap, self.floor, xp=torch)
        if self.decay is not None:
            ratio = self._averaged(ratio, local(tensor.state["trust_log"]), decays, orders)

        def scaled(number: int) -> Tensor:
            u = block(number)
            return u * spread(ratio, tensor, number, u, part)

        return scaled

    def _averaged(self, ratio: Tensor, kept: Tensor, decays: Tensor, orders: Orders) -> Tensor:
        """The geometric mean of the ratios so far; 1 on a skipped step, which may be the first."""
        new = formulas.log_average(kept, ratio, self.decay, xp=torch)
        kept.copy_(torch.where(orders.ok, new, kept))
        return torch.where(orders.ok, formulas.averaged_ratio(kept, decays, xp=torch), 1.0)


@dataclasses.dataclass(frozen=True)
class AdaptiveGradientClip(Wrapped):
    r"""Adaptive gradient clipping (AGC): no gradient is longer than a share of its parameter.

    $$
    g \leftarrow g \, \min\left(1,
    \frac{c \max(\lVert \theta \rVert, \varepsilon)}{\lVert g \rVert}\right)
    $$

    It acts on the gradient, before the moments of `inner` and after the law's own clip: the length
    of a direction says nothing of how good the step is.

    Attributes:
        inner: the direction, which gets the clipped gradient.
        clip: $c$, above 0.
        eps: a parameter's norm counts as at least this, above 0.
        per: `"tensor"`, or `"row"`, for every vector along the last axis.

    Raises:
        ValueError: where an argument is outside its range.

    Examples:
        >>> import torch
        >>> import cruxy_torch
        >>> x = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [30.0, 40.0]]))
        >>> direction = cruxy_torch.AdaptiveGradientClip(cruxy_torch.Momentum(), 0.1, per="row")
        >>> optimizer = cruxy_torch.CruxyOptimizer([x], betas=(0.0, 0.0), direction=direction)
        >>> x.sum().mul(0.5).backward()
        >>> _ = optimizer.step()
        >>> optimizer.state[x]["exp_avg"]
        tensor([[0.3536, 0.3536],
                [0.5000, 0.5000]])

    References:
        Brock et al., [High-Performance Large-Scale Image Recognition Without
        Normalization](https://arxiv.org/abs/2102.06171), 2021, equation 3.
    """

    inner: Direction
    clip: float = 0.02
    eps: float = formulas.AGC_EPS
    per: Literal["tensor", "row"] = "tensor"

    def __post_init__(self) -> None:
        remedy = "0.01 to 0.1 are usual values"
        check_range("clip", self.clip, 0.0, lower_open=True, remedy=remedy)
        check_range("eps", self.eps, 0.0, lower_open=True, remedy="keep the default")
        _check_one_of("per", self.per, ("tensor", "row"))

    def own_factors(self, columns: Columns, orders: Orders) -> Sequence[Any]:
        """Of each tensor its part."""
        return parts_of(columns, self.per, None)

    def stages(
        self, tensor: SteppedTensor, factors: Any, orders: Orders
    ) -> Stages[Callable[[int], Tensor]]:
        """What `inner` makes of the clipped gradient."""
        factors, part = factors
        scale = yield from clip_factor(tensor, part, self.clip, self.eps)
        clipped = cast(SteppedTensor, Clipped(tensor, scale, part))
        return (yield from stages_of(self.inner, clipped, factors, orders))


def clip_factor(tensor: SteppedTensor, part: Part, clip: Any, eps: float) -> Stages[Tensor]:
    """The factor of adaptive clipping on each part of a gradient.

    Args:
        tensor: whose gradient it is.
        part: how it is divided.
        clip: see `AdaptiveGradientClip`; a number or a 0-d tensor.
        eps: likewise.
    """
    count = tensor.shape[-1] if part.per == "row" else tensor.numel
    squares = (
        mean_squares(map(x, range(tensor.blocks)), tensor, part)
        for x in (tensor.gradient, tensor.value)
    )
    each = yield from side_by_side(*squares)
    g_norm, p_norm = (root(square * count, xp=torch) for square in each)
    return formulas.agc_scale(g_norm, p_norm, clip, eps, xp=torch)


class Clipped:
    """A tensor in a step whose gradient is multiplied by factors; all else is as it was."""

    def __init__(self, tensor: SteppedTensor, scale: Tensor, part: Part) -> None:
        self._tensor, self._scale, self._part = tensor, scale, part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)

    def gradient(self, number: int) -> Tensor:
        """A block of the gradient, clipped."""
        x = self._tensor.gradient(number)
        return x * spread(self._scale, self._tensor, number, x, self._part)


@dataclasses.dataclass(frozen=True)
class ClipRms(Wrapped):
    r"""Scales a direction down where its root mean square is above a limit.

    $$
    u \leftarrow u \, \min(1, \text{limit} / \mathrm{rms}(u))
    $$

    Of a tensor in several blocks the whole direction is held meanwhile.

    Attributes:
        inner: the direction.
        limit: above 0.
        per: `"tensor"`; `"row"`, for every vector along the last axis; `"block"`, for every 256
            elements along it, the last of which may be fewer. Blocks are those of a rank's shard.

    Raises:
        ValueError: where an argument is outside its range.

    Examples:
        >>> import torch
        >>> import cruxy_torch
        >>> x = torch.nn.Parameter(torch.zeros(2, 2))
        >>> direction = cruxy_torch.ClipRms(cruxy_torch.SignBlend(weight=1.0), 0.5, per="row")
        >>> optimizer = cruxy_torch.CruxyOptimizer([x], lr=1.0, direction=direction)
        >>> (x * torch.tensor([[4.0, -4.0], [0.4, 0.4]])).sum().backward()
        >>> _ = optimizer.step()
        >>> -x.detach() / optimizer.telemetry()["learning_rate"]
        tensor([[ 0.5000, -0.5000],
                [ 0.1407,  0.1407]])

    References:
        Shazeer and Stern, [Adafactor](https://arxiv.org/abs/1804.04235), 2018, section 6.
    """

    inner: Direction
    limit: float = 1.0
    per: Literal["tensor", "row", "block"] = "tensor"

    def __post_init__(self) -> None:
        check_range("limit", self.limit, 0.0, lower_open=True, remedy="1 is Adafactor's")
        _check_one_of("per", self.per, ("tensor", "row", "block"))

    def own_factors(self, columns: Columns, orders: Orders) -> Sequence[Any]:
        """Of each tensor its part."""
        return parts_of(columns, self.per, None)

    def stages(
        self, tensor: SteppedTensor, factors: Any, orders: Orders
    ) -> Stages[Callable[[int], Tensor]]:
        """The direction, its parts scaled down."""
        factors, part = factors
        u = yield from held(self.inner, tensor, factors, orders)
        rms = root((yield from mean_squares(u, tensor, part)), xp=torch)
        scale = formulas.rms_clip_scale(rms, self.limit, xp=torch)
        return lambda i: u[i] * spread(scale, tensor, i, u[i], part)


def _check_one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {known}, got {value!r}; give one of them.")
