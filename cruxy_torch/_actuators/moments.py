"""Adam's and Lion's directions, with decay rates that the controller moves."""

# torch's foreach calls are what torch.optim itself is built on, underscore and all.
# pyright: reportPrivateImportUsage=false

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cruxy_control.formulas.moments import seen
from cruxy_torch._actuators.direction import Direction
from cruxy_torch._actuators.stepped import Bucket, Frame
from cruxy_torch._columns import Columns
from cruxy_torch._kept import assign
from cruxy_torch._native import passes
from cruxy_torch._orders import Orders


@dataclasses.dataclass(frozen=True)
class Adam(Direction):
    """Adam's direction, normalised by what the moments really weigh.

    With moving decay rates the normaliser of the first moment is one minus the product of all of
    them; of the Nesterov numerator, one minus that product times today's.

    Attributes:
        eps: added to the root of the second moment.
        nesterov: the numerator is `beta1 m + (1 - beta1) g` instead of `m`.
    """

    eps: float
    nesterov: bool

    is_finite = True
    moments = ("exp_avg", "exp_avg_sq")
    clocks = ("beta1_product", "beta2_product")

    def advance(
        self, columns: Columns, orders: Orders, gates: Sequence[Tensor] = ()
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The factors on the numerator and on the second moment, and `eps`.

        Args:
            columns: see `Direction.advance`.
            orders: likewise.
            gates: factors on the direction of each tensor; empty for none.
        """
        if not columns.states:
            return []
        product1, product2 = (
            advanced([state[name] for state in columns.states], beta)
            for name, beta in zip(self.clocks, (orders.beta1, orders.beta2), strict=True)
        )
        if self.nesterov:
            product1 = product1 * orders.beta1
        gain, spread = 1.0 / seen(product1, xp=torch), 1.0 / seen(product2, xp=torch)
        # A skipped step multiplies what comes out by 0, which 0 / 0 would survive.
        eps = torch.where(orders.ok, self.eps * torch.ones_like(spread), 1.0)
        if gates:
            gain = gain * torch.stack(list(gates))
        return list(zip(gain.unbind(), spread.unbind(), eps.unbind(), strict=True))

    def formula(
        self, x: Tensor, moments: dict[str, Tensor], factors: Any, orders: Orders
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`m gain / (sqrt(v spread) + eps)`."""
        gain, spread, eps = factors
        m = u = orders.beta1 * moments["exp_avg"] + (1.0 - orders.beta1) * x
        square = moments["exp_avg_sq"]
        square.mul_(orders.beta2).addcmul_(x * (1.0 - orders.beta2), x)
        if self.nesterov:
            u = orders.beta1 * u + (1.0 - orders.beta1) * x
        direction = u * gain / ((square * spread).sqrt_() + eps)
        return direction, {"exp_avg": m, "exp_avg_sq": square}

    def foreach(self, bucket: Bucket, factors: Sequence[Any], orders: Orders) -> list[Tensor]:
        """The same, for many tensors at once."""
        gains, spreads, epses = (list(column) for column in zip(*factors, strict=True))
        xs = bucket.gradients
        us = _mix(bucket.read("exp_avg"), xs, orders.beta1)
        bucket.write("exp_avg", us)
        squares = torch._foreach_mul(xs, xs)
        torch._foreach_mul_(squares, 1.0 - orders.beta2)
        averages = bucket.read("exp_avg_sq")
        torch._foreach_mul_(averages, orders.beta2)
        torch._foreach_add_(averages, squares)
        bucket.write("exp_avg_sq", averages)
        del squares
        if self.nesterov:
            us = _mix(us, xs, orders.beta1)
        torch._foreach_mul_(us, gains)
        denominators = torch._foreach_mul(averages, spreads)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, epses)
        torch._foreach_div_(us, denominators)
        return us

    def native(self, columns: Columns, orders: Orders, frame: Frame) -> None:
        """The whole update in one pass."""
        passes.update(
            columns,
            orders,
            self.moments,
            self.clocks,
            decay=float(frame.decay or 0.0),
            l2=float(frame.l2 or 0.0),
            eps=self.eps,
            nesterov=self.nesterov,
            centralize=frame.centralize,
        )

    def triton(self, columns: Columns, orders: Orders, frame: Frame) -> None:
        """The whole update in one launch; the law's factor on the decay stays on the device."""
        from cruxy_torch._native import triton_passes

        triton_passes.update(
            columns,
            orders,
            self.moments,
            self.clocks,
            decay=0.0 if frame.coupled else frame.weight_decay,
            l2=frame.weight_decay if frame.coupled else 0.0,
            eps=self.eps,
            nesterov=self.nesterov,
            centralize=frame.centralize,
        )


@dataclasses.dataclass(frozen=True)
class Lion(Direction):
    """Lion's direction (WP 11, 12): a sign, of one moment."""

    is_finite = True
    kind = "lion"
    moments = ("exp_avg",)

    def formula(
        self, x: Tensor, moments: dict[str, Tensor], factors: Any, orders: Orders
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`sign(beta1 m + (1 - beta1) g)`; the moment decays by `beta2`."""
        m = moments["exp_avg"]
        direction = (orders.beta1 * m + (1.0 - orders.beta1) * x).sign_()
        return direction, {"exp_avg": orders.beta2 * m + (1.0 - orders.beta2) * x}

    def foreach(self, bucket: Bucket, factors: Sequence[Any], orders: Orders) -> list[Tensor]:
        """The same, for many tensors at once."""
        momenta = bucket.read("exp_avg")
        us = _mix(momenta, bucket.gradients, orders.beta1)
        torch._foreach_sign_(us)
        bucket.write("exp_avg", _mix(momenta, bucket.gradients, orders.beta2))
        return us

    def native(self, columns: Columns, orders: Orders, frame: Frame) -> None:
        """The whole update in one pass."""
        decay = float(frame.decay or 0.0)
        passes.update(columns, orders, self.moments, decay=decay, centralize=frame.centralize)

    def triton(self, columns: Columns, orders: Orders, frame: Frame) -> None:
        """The whole update in one launch."""
        from cruxy_torch._native import triton_passes

        decay = frame.weight_decay
        triton_passes.update(
            columns, orders, self.moments, decay=decay, centralize=frame.centralize
        )


def advanced(products: list[Tensor], beta: Tensor) -> Tensor:
    """The products of decay rates with one more factor, which are kept."""
    new = torch.stack(products) * beta
    assign(products, new.unbind())
    return new


def _mix(averages: Sequence[Tensor], xs: Sequence[Tensor], beta: Tensor) -> list[Tensor]:
    """`beta m + (1 - beta) x` as new tensors."""
    mixed = torch._foreach_mul(list(xs), 1.0 - beta)
    torch._foreach_add_(mixed, torch._foreach_mul(list(averages), beta))
    return list(mixed)
