"""Adam under a control law on exact scalars: signals, orders, limits and averages, bit for bit.

Over the array namespace `xp`; in JAX inside `jax.enable_x64(True)`. No order of the tensors and no
sharding can matter: what is summed over tensors is summed exactly.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from cruxy_exact._namespace import zeros
from cruxy_exact.arithmetic import add, f32, mul, settle, sub
from cruxy_exact.optimizers import (
    adam_direction,
    change,
    gamma_norm,
    global_norm,
    norms_and_product,
    rounded,
)
from cruxy_exact.scalars import Exact, Namespace, Scalar, unwrapped, wrapped
from cruxy_exact.sums import total


class DrivenState(NamedTuple):
    """What is kept beside moments, averages and products of decay rates.

    Attributes:
        law_state: the law's own.
        limit_scale: what the limit left of the rate in the last step; float32, `()`.
        base_rate: the largest rate that was set in the last step; float32, `()`.
        count: steps that moved something; int32, `()`.
    """

    law_state: Any
    limit_scale: Any
    base_rate: Any
    count: Any


class Group(NamedTuple):
    """Parameters with the same options.

    Attributes:
        learning_rate: a number, or float32 `()`.
        b1: the user's decay rate of the first moment.
        b2: of the second.
        eps: added to the root of the second moment.
        products: of all decay rates so far; two float32 `()`.
    """

    learning_rate: Any
    b1: float
    b2: float
    eps: float
    products: tuple[Any, Any]


class Leaf(NamedTuple):
    """A parameter with what belongs to it.

    Attributes:
        p: the parameter; float32.
        g: its gradient, settled.
        m: its first moment.
        v: its second moment.
        average: of the parameter; `None` where none is kept.
        weight_decay: decoupled.
        group: the number of its group.
    """

    p: Any
    g: Any
    m: Any
    v: Any
    average: Any
    weight_decay: float
    group: int = 0


class Moved(NamedTuple):
    """What a step makes of a leaf; `change` is what it takes off the parameter."""

    change: Any
    m: Any
    v: Any
    average: Any


@dataclasses.dataclass(frozen=True)
class Driven:
    """Adam under a law. The same object serves every namespace.

    Attributes:
        law: the law, such as `cruxy_control.SelfDriving()`.
        rules: `cruxy_control.driving`; this package knows no laws, and is handed what they mean.
        nesterov: looks one step ahead.
        relative_limit: no tensor gets a rate above this share of its size, less where it is wide;
            `None` for no limit.
        averaging: the power of the average of the iterates; `None` for no average.
    """

    law: Any
    rules: Any
    nesterov: bool = False
    relative_limit: float | None = None
    averaging: float | None = None

    def init(self, like: Any, *, xp: Any) -> DrivenState:
        """The state before the first step, on the device of the float32 array `like`, `()`."""
        count = zeros((), xp.int32, like, xp=xp)
        return DrivenState(Exact(self.law).init(like, xp=xp), like * 0 + 1.0, like * 0, count)

    def step(
        self,
        state: DrivenState,
        groups: Sequence[Group],
        leaves: Sequence[Leaf],
        loss: Any,
        *,
        xp: Any,
    ) -> tuple[DrivenState, list[tuple[Any, Any]], list[Moved]]:
        """One step.

        Args:
            state: the last one's.
            groups: the groups.
            leaves: every parameter that has a gradient; at least one that is not empty.
            loss: of this step; float32 `()`, or `None`.
            xp: the array namespace.

        Returns:
            The new state, the products of each group, and what has become of each leaf.
        """
        like, rules = state.limit_scale, self.rules
        space = Namespace(xp, like)
        law_state, controls = self._ask(state, leaves, loss, xp)
        scalars = wrapped(controls, xp)
        orders = [
            rules.adam_orders(
                scalars,
                _scalar(group.learning_rate, like, xp),
                f32(group.b1),
                f32(group.b2),
                wrapped(tuple(group.products), xp),
                nesterov=self.nesterov,
                xp=space,
            )
            for group in groups
        ]
        limits = self._limits(scalars, leaves, space)
        ok, shares = controls.ok, []
        weight = like * 0
        if self.averaging is not None:
            weight = rules.averaging_weight(Scalar(state.count, xp), self.averaging, xp=space)
            weight = unwrapped(space.where(ok, weight, 0.0))
        moved = []
        for leaf, limit in zip(leaves, limits, strict=True):
            own = orders[leaf.group]
            rate = own.rate if limit is None else space.minimum(own.rate, limit)
            shares.append(rules.rate_share(None if limit is None else rate, own.rate, xp=space))
            moved.append(self._moved(leaf, groups[leaf.group], own, rate, scalars, weight, xp))
        share = _largest(shares, space)
        base = _largest([_scalar(group.learning_rate, like, xp) for group in groups], space)
        new = DrivenState(
            law_state,
            xp.where(ok, unwrapped(share), state.limit_scale),
            xp.where(ok, unwrapped(base), state.base_rate),
            xp.where(ok, _next(state.count, xp), state.count),
        )
        return new, [unwrapped(own.products) for own in orders], moved

    def _ask(
        self, state: DrivenState, leaves: Sequence[Leaf], loss: Any, xp: Any
    ) -> tuple[Any, Any]:
        """The law's new state and the controls of this step."""
        rules, like = self.rules, state.limit_scale
        pairs = [(leaf.g, leaf.m) for leaf in leaves if 0 not in tuple(leaf.g.shape)]
        grads = [g for g, _ in pairs]
        signals = rules.signals_of(
            self.law,
            *(
                Scalar(x, xp)
                for x in (
                    global_norm(grads, xp=xp),
                    gamma_norm(grads, self.law.gamma, xp=xp),
                    like * 0 + rules.NOT_KNOWN if loss is None else loss,
                )
            ),
            self._agreement(pairs, xp),
            Scalar(state.limit_scale, xp),
            Scalar(state.base_rate, xp),
            xp=Namespace(xp, like),
        )
        return Exact(self.law).step(state.law_state, unwrapped(signals), xp=xp)

    def _agreement(self, pairs: Sequence[tuple[Any, Any]], xp: Any) -> Any:
        if not self.rules.needs_alignment(self.law):
            return None
        return tuple(Scalar(x, xp) for x in norms_and_product(*zip(*pairs, strict=True), xp=xp))

    def _limits(self, controls: Any, leaves: Sequence[Leaf], space: Namespace) -> list[Any]:
        """The largest rate of each leaf; `None` where there is no limit."""
        if self.relative_limit is None:
            return [None] * len(leaves)
        squares, shapes = [], []
        for leaf in leaves:
            p, shape = settle(leaf.p, xp=space.xp), tuple(leaf.p.shape)
            square = total(mul(p, p, xp=space.xp), xp=space.xp)
            squares.append(
                Scalar(mul(square, f32(1 / max(1, math.prod(shape))), xp=space.xp), space.xp)
            )
            shapes.append(shape)
        return self.rules.largest_rates(controls, squares, shapes, self.relative_limit, xp=space)

    def _moved(
        self,
        leaf: Leaf,
        group: Group,
        orders: Any,
        rate: Any,
        controls: Any,
        weight: Any,
        xp: Any,
    ) -> Moved:
        b1, b2, factors, lr = unwrapped(
            (orders.beta1, orders.beta2, (orders.factor1, orders.factor2),
             rate * controls.phase_scale)
        )  # fmt: skip
        g = mul(leaf.g, controls.clip_scale.value, xp=xp)
        g = xp.where(controls.ok, g, xp.zeros_like(g))
        options = {"b1": b1, "b2": b2, "eps": group.eps, "nesterov": self.nesterov}
        m, v, u = adam_direction(g, leaf.m, leaf.v, factors, **options, xp=xp)
        decay = rounded(leaf.weight_decay)
        if self.rules.steers_decay(self.law):
            decay = mul(controls.decay_scale.value, decay, xp=xp)
        p = settle(leaf.p, xp=xp)
        taken = change(p, u, lr=lr, weight_decay=decay, xp=xp)
        average = leaf.average
        if average is not None:
            way = sub(sub(p, taken, xp=xp), average, xp=xp)
            average = add(average, mul(way, weight, xp=xp), xp=xp)
        return Moved(taken, m, v, average)


def _scalar(number: Any, like: Any, xp: Any) -> Scalar:
    """A Python number as f32, or a float32 array."""
    return Scalar(number if hasattr(number, "dtype") else like * 0 + f32(number), xp)


def _largest(numbers: Sequence[Scalar], space: Namespace) -> Scalar:
    out = numbers[0]
    for number in numbers[1:]:
        out = space.maximum(out, number)
    return out


def _next(count: Any, xp: Any) -> Any:
    """One more, up to the largest int32."""
    return xp.where(count < 2**31 - 1, count + 1, count)
