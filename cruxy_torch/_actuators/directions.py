"""Directions that are made of others: a momentum, and what lies between its sign and itself."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cruxy_control.checks import check_range
from cruxy_control.formulas.directions import BLEND, blend_sign, momentum_share
from cruxy_torch._actuators.direction import Direction
from cruxy_torch._actuators.staged import Staged, Stages, held, root_mean_square, stages_of
from cruxy_torch._actuators.stepped import SteppedTensor
from cruxy_torch._columns import Columns
from cruxy_torch._kept import assign
from cruxy_torch._orders import Orders


class Wrapped(Staged):
    """A direction that changes what another one gives, and keeps what that keeps.

    A subclass has the other as `inner`. `advance` gives for each tensor a pair: the factors of
    `inner`, and what `own_factors` gives.
    """

    inner: Direction

    @property
    def moments(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of `inner`."""
        return self.inner.moments

    @property
    def clocks(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of `inner`."""
        return self.inner.clocks

    @property
    def is_finite(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As `inner`: what is done here divides by no zero."""
        return self.inner.is_finite

    @property
    def kind(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As `inner`."""
        return self.inner.kind

    @property
    def joins(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As `inner`."""
        return isinstance(self.inner, Staged) and self.inner.joins

    def start(self, state: dict[str, Any], param: Tensor, add: Callable[[str], None]) -> None:
        """Adds what `inner` keeps."""
        self.inner.start(state, param, add)

    def advance(self, columns: Columns, orders: Orders) -> Sequence[Any]:
        """Of each tensor the factors of `inner` and its own."""
        inner = self.inner.advance(columns, orders)
        return list(zip(inner, self.own_factors(columns, orders), strict=True))

    def own_factors(self, columns: Columns, orders: Orders) -> Sequence[Any]:
        """What is decided here once a step for each tensor."""
        return [()] * len(columns.params)


@dataclasses.dataclass(frozen=True)
class Momentum(Staged):
    r"""Lion's momentum before its sign is taken, for `SignBlend` around it.

    $$
    c_t = \beta_{1,t} m_{t-1} + (1 - \beta_{1,t}) x_t, \qquad
    m_t = \beta_{2,t} m_{t-1} + (1 - \beta_{2,t}) x_t
    $$

    Its size is that of what it averages: what is put around it has to make it about 1. The rates
    are the group's `betas`, which the law moves; Lion's authors use (0.9, 0.99).

    Attributes:
        inner: the direction $x$ that is averaged; `None` for the gradient itself. One that has a
            momentum of its own is refused.

    Raises:
        ValueError: where `inner` keeps a moment `exp_avg` too.

    Examples:
        >>> import torch
        >>> import cruxy_torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> direction = cruxy_torch.SignBlend(cruxy_torch.Momentum(), weight=0.0)
        >>> optimizer = cruxy_torch.CruxyOptimizer(
        ...     [x], lr=0.01, betas=(0.9, 0.99), weight_decay=0.0, direction=direction
        ... )
        >>> (x**2).sum().backward()
        >>> _ = optimizer.step()
        >>> x.detach()
        tensor([ 0.9925, -0.9925])
    """

    inner: Direction | None = None

    def __post_init__(self) -> None:
        if self.inner is not None and "exp_avg" in self.inner.moments:
            raise ValueError(
                "inner must not keep a momentum of its own, got "
                f"{type(self.inner).__name__} with {self.inner.moments}; leave Momentum out."
            )

    @property
    def moments(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The momentum, and what `inner` keeps."""
        return ("exp_avg", *(self.inner.moments if self.inner else ()))

    @property
    def clocks(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of `inner`."""
        return self.inner.clocks if self.inner else ()

    @property
    def is_finite(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As `inner`."""
        return self.inner is None or self.inner.is_finite

    def start(self, state: dict[str, Any], param: Tensor, add: Callable[[str], None]) -> None:
        """Adds the momentum, and what `inner` keeps."""
        if self.inner is not None:
            self.inner.start(state, param, add)
        super().start(state, param, add)

    def advance(self, columns: Columns, orders: Orders) -> Sequence[Any]:
        """Of each tensor the factors of `inner`."""
        return (self.inner or super()).advance(columns, orders)

    @property
    def holds(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As `inner`."""
        return isinstance(self.inner, Staged) and self.inner.holds

    def stages(
        self, tensor: SteppedTensor, factors: Any, orders: Orders
    ) -> Stages[Callable[[int], Tensor]]:
        """`beta1 m + (1 - beta1) x`; the moment decays by `beta2`."""
        x = tensor.gradient
        if self.inner is not None:
            x = yield from stages_of(self.inner, tensor, factors, orders)
        # What stands for a tensor, as one that clips, has another gradient.
        is_raw = self.inner is None and type(tensor) is SteppedTensor

        def block(number: int) -> Tensor:
            done = tensor.momentum("exp_avg", number) if is_raw else None
            if done is not None:
                return done
            own, m = x(number), tensor.read("exp_avg", number)
            c = orders.beta1 * m + (1.0 - orders.beta1) * own
            tensor.write("exp_avg", number, orders.beta2 * m + (1.0 - orders.beta2) * own)
            return c

        return block


@dataclasses.dataclass(frozen=True)
class SignBlend(Wrapped):
    r"""A sign that is soft below the tensor's own root mean square, and a share of the momentum.

    $$
    u = (1 - w)\, s\, \frac{(1 + \tau)\, c}{|c| + \tau\, \mathrm{rms}(c)}
    + \big(1 - (1 - w)\, s\big)\, \frac{c}{\mathrm{rms}(c)}
    $$

    At $\tau = 0$ and $w = 0$ it is Lion's sign, to the bit. Gradients a thousand times as large
    change nothing. $s$ is `Controls.sign_weight`, 1 but under a law that takes the sign away, such
    as `PlateauGuard`. A tensor is passed over twice: of one that comes in several blocks the whole
    $c$ is held meanwhile.

    `python -m benchmarks components` measures what a blend and a temperature are worth.

    Attributes:
        inner: the direction $c$.
        temperature: $\tau$, at least 0.
        weight: $w$, the share of the momentum, in `[0, 1]`; or a schedule of it: a function of the
            number of good steps of a tensor, an int32 tensor `()`, that can be pickled.

    Raises:
        ValueError: where a number is outside its range.

    Examples:
        >>> import torch
        >>> import cruxy_torch
        >>> x = torch.nn.Parameter(torch.tensor([7.0, 1.0, 0.0, -1.0, -7.0]))
        >>> direction = cruxy_torch.SignBlend(temperature=0.0, weight=0.5)
        >>> optimizer = cruxy_torch.CruxyOptimizer(
        ...     [x], lr=1.0, weight_decay=0.0, direction=direction
        ... )
        >>> (x**2).sum().backward()
        >>> _ = optimizer.step()
        >>> rate = optimizer.telemetry()["learning_rate"]
        >>> ((torch.tensor([7.0, 1.0, 0.0, -1.0, -7.0]) - x.detach()) / rate).round(decimals=2)
        tensor([ 1.2800,  0.6100,  0.0000, -0.6100, -1.2800])

    References:
        A case of Lion-K: Chen et al., [Lion Secretly Solves Constrained
        Optimization](https://arxiv.org/abs/2310.05898), 2023.
    """

    inner: Direction = Momentum()
    temperature: float = 1.0
    weight: float | Callable[[Tensor], Any] = BLEND

    kind = "lion"  # pyright: ignore[reportAssignmentType]

    def __post_init__(self) -> None:
        remedy = "0 is the sign, 1 is soft below the root mean square"
        check_range("temperature", self.temperature, 0.0, remedy=remedy)
        if not callable(self.weight):
            remedy = "0 is the sign alone, 1 the momentum alone"
            check_range("weight", self.weight, 0.0, 1.0, remedy=remedy)

    def start(self, state: dict[str, Any], param: Tensor, add: Callable[[str], None]) -> None:
        """Adds what `inner` keeps, and a counter for a schedule."""
        if callable(self.weight) and "blend_step" not in state:
            state["blend_step"] = torch.zeros((), dtype=torch.int32, device=param.device)
        super().start(state, param, add)

    def own_factors(self, columns: Columns, orders: Orders) -> Sequence[Any]:
        """Of each tensor the share of the momentum."""
        if not columns.states or not callable(self.weight):
            return [momentum_share(self.weight, orders.sign_weight)] * len(columns.states)
        counters = [state["blend_step"] for state in columns.states]
        shares = [momentum_share(self.weight(count), orders.sign_weight) for count in counters]
        assign(counters, (torch.stack(counters) + orders.ok).unbind())
        return shares

    def stages(
        self, tensor: SteppedTensor, factors: Any, orders: Orders
    ) -> Stages[Callable[[int], Tensor]]:
        """The blend of a momentum."""
        inner, weight = factors
        c = yield from held(self.inner, tensor, inner, orders)
        return (yield from self.of(c, tensor, weight))

    def of(
        self, c: list[Tensor], tensor: SteppedTensor, weight: Any
    ) -> Stages[Callable[[int], Tensor]]:
        """The blend of a momentum that is held, block by block."""
        rms = yield from root_mean_square(c, tensor)
        return lambda i: blend_sign(c[i], weight, self.temperature, rms, xp=torch)
