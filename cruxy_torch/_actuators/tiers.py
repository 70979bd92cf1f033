"""COSMIC's direction: each tensor's sign, scaled sign or Adam's, behind its noise gate."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cruxy_control import filters, tiers
from cruxy_control.tiers import FAST_DECAY, SLOW_DECAY
from cruxy_torch._actuators.direction import Direction
from cruxy_torch._actuators.moments import Adam
from cruxy_torch._actuators.stepped import Bucket, SteppedTensor
from cruxy_torch._columns import Columns
from cruxy_torch._distributed.shards import add_shards, local
from cruxy_torch._kept import assign, compute_dtype, plain
from cruxy_torch._orders import Orders


@dataclasses.dataclass(frozen=True, eq=False)
class Tiered(Direction):
    """What `Cosmic` documents. What a tensor keeps says at which tier it is.

    Attributes:
        adam: the direction at tier 2.
        peers: averaged mean squares of the tensors of tier 1 in this group that do not move now;
            float32, `()`.
        unscale: one over the factor of a `GradScaler`; `None` for 1.
    """

    adam: Adam
    peers: Sequence[Tensor] = ()
    unscale: Tensor | None = None

    is_finite = True
    moments = Adam.moments

    def start(self, state: dict[str, Any], param: Tensor, add: Callable[[str], None]) -> None:
        """Nothing: a plan has given the tensor what its tier takes."""

    def advance(self, columns: Columns, orders: Orders) -> Sequence[Any]:
        """Of a tensor of tier 2 Adam's factors, gated; of another the size of its step."""
        if not columns.states:
            return []
        squares = plain(_mean_squares(columns.wholes))
        if self.unscale is not None:
            squares = squares * self.unscale.to(squares.device).square()
        weight, gates = _observed(columns.states, squares, orders.ok)
        relative = self._relative(columns.states, squares, weight, orders.ok)
        at_moments = [i for i, state in enumerate(columns.states) if has_moments(state)]
        factors: list[Any] = [
            gate if factor is None else gate * factor
            for gate, factor in zip(gates.unbind(), relative, strict=True)
        ]
        own = self.adam.advance(
            columns.select(at_moments), orders, [factors[i] for i in at_moments]
        )
        for index, adam in zip(at_moments, own, strict=True):
            factors[index] = adam
        return factors

    def blocks(
        self, tensor: SteppedTensor, factors: Any, orders: Orders
    ) -> Callable[[int], Tensor]:
        """Adam's direction, or `factor 0.2 sign(g)`."""
        if has_moments(tensor.state):
            return self.adam.blocks(tensor, factors, orders)
        size = tiers.SIGN_STEP * factors
        return lambda number: tensor.gradient(number).sign() * size

    def fused(self, tensor: SteppedTensor, factors: Any, orders: Orders, rate: Tensor) -> bool:
        """A tensor's whole step by a library's kernels, see `Direction.fused`."""
        if has_moments(tensor.state):
            own, nesterov = self.adam.moments, self.adam.nesterov
            return tensor.adam(own, factors, rate, nesterov=nesterov)
        return tensor.sign(tiers.SIGN_STEP * factors, rate)

    def foreach(self, bucket: Bucket, factors: Sequence[Any], orders: Orders) -> list[Tensor]:
        """The same, for many tensors that all have moments or all have none."""
        if bucket.has("exp_avg"):
            return self.adam.foreach(bucket, factors, orders)
        signs = list(torch._foreach_sign(bucket.gradients))  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(signs, [tiers.SIGN_STEP * factor for factor in factors])  # pyright: ignore[reportPrivateImportUsage]
        return signs

    def _relative(
        self, states: Sequence[dict[str, Any]], squares: Tensor, weight: Tensor, ok: Tensor
    ) -> Sequence[Tensor | None]:
        """Advances the scalars of tier 1; their factor on each tensor's sign, else `None`."""
        places = [place for place, state in enumerate(states) if "mean_square" in state]
        if not places:
            return [None] * len(states)
        kept = [states[place]["mean_square"] for place in places]
        old = torch.stack(kept)
        new = tiers.averaged_square(old, weight[places], squares[places])
        new = torch.where(ok, new, old)
        assign(kept, new.unbind())
        peers = [peer.to(new.device) for peer in self.peers]
        mean = torch.cat([new, torch.stack(peers)]).mean() if peers else new.mean()
        factors: list[Tensor | None] = [None] * len(states)
        relative = tiers.relative_scale(new, mean, xp=torch)
        for place, factor in zip(places, relative.unbind(), strict=True):
            factors[place] = factor
        return factors


def has_moments(state: dict[str, Any]) -> bool:
    """Whether a tensor is at tier 2."""
    return "beta1_product" in state


def _observed(
    states: Sequence[dict[str, Any]], squares: Tensor, ok: Tensor
) -> tuple[Tensor, Tensor]:
    """Advances the averages; the slow ones' old weights, and the gate of each tensor."""
    columns = [[state[name] for state in states] for name in ("grad_fast", "grad_slow", "step")]
    fast, slow, step = (torch.stack(column) for column in columns)
    old = windows(fast, slow, step)
    new = filters.select(ok, tiers.observe(old, squares.sqrt(), xp=torch), old, xp=torch)
    values = (new.fast.value, new.slow.value, step + ok)
    for column, moved in zip(columns, values, strict=True):
        assign(column, moved.unbind())
    # A skipped step multiplies by 0 what a gradient that is not finite would have gated.
    return old.slow.weight, torch.where(ok, tiers.noise_gate(new, xp=torch), 0.0)


def _mean_squares(grads: Sequence[Tensor]) -> Tensor:
    """Of the raw gradients, each over all ranks; a float32 vector."""
    parts = list(map(local, grads))
    norms = [torch.linalg.vector_norm(part, dtype=compute_dtype(part)) for part in parts]
    means = [n.square() / max(1, g.numel()) for n, g in zip(norms, grads, strict=True)]
    total = torch.stack([mean.to(torch.float32) for mean in means])
    add_shards(total, grads)
    return total


def windows(fast: Tensor, slow: Tensor, step: Tensor) -> filters.Windows:
    """The averages of some tensors, filled as far as their steps say: to `1 - decay^step`."""
    count = step.to(torch.float32)
    weights = (-torch.expm1(count * math.log(decay)) for decay in (FAST_DECAY, SLOW_DECAY))
    return filters.Windows(*map(filters.Ema, (fast, slow), weights))
