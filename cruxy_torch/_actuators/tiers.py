"""COSMIC's update: each tensor's sign, scaled sign or Adam's direction, behind its noise gate."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cruxy_control import filters, tiers
from cruxy_control.tiers import FAST_DECAY, SLOW_DECAY
from cruxy_torch import _kept as _storage
from cruxy_torch._actuators import apply as _kernels
from cruxy_torch._actuators.apply import Options, Scalars, Tensors
from cruxy_torch._actuators.factored import over_ranks
from cruxy_torch._kept import Kept, compute_dtype
from cruxy_torch._sensors.measure import local
from cruxy_torch._step import Group


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosmicGroup(Group):
    """Parameters that have a gradient, by tier, with the averages that every tensor has.

    Attributes:
        params: this rank's parameters.
        fasts: fast averages of the gradients' sizes; float32, `()`.
        slows: slow ones.
        steps: good steps of each tensor; int32, `()`.
        scalars: of each tensor at tier 1 its averaged mean square, float32 `()`; else `None`.
        peers: those of the tensors of tier 1 in this group that are not updated now.
        moments: the tensors of tier 2 with their moments, in the order of `params`.
        at_moments: their indices in `params`.
        options: what the group fixes for Adam.
        unscale: one over the factor of a `GradScaler`; `None` for 1.
    """

    params: list[Kept]
    fasts: list[Tensor]
    slows: list[Tensor]
    steps: list[Tensor]
    scalars: list[Tensor | None]
    peers: list[Tensor]
    moments: Tensors
    at_moments: list[int]
    options: Options
    unscale: Tensor | None

    def update(self, scalars: Scalars, *, native: bool, foreach: bool) -> None:
        """Updates parameters and state in place."""
        for device, indices in _kernels.by_device(self.grads).items():
            self._update(indices, scalars.to(device), foreach=foreach)

    def _update(self, indices: list[int], s: Scalars, *, foreach: bool) -> None:
        squares = torch.stack([_mean_square(self.grads[i]) for i in indices])
        if self.unscale is not None:
            squares = squares * self.unscale.to(squares.device).square()
        weight, gates = self._observe(indices, squares, s.ok)
        factors = self._relative(indices, squares, weight, s.ok)
        at = {index: place for place, index in enumerate(self.at_moments)}
        adam: list[int] = []
        adam_gates: list[Tensor] = []
        for i, gate, factor in zip(indices, gates.unbind(), factors, strict=True):
            if i in at:
                adam.append(at[i])
                adam_gates.append(gate)
            else:
                factor = gate if factor is None else gate * factor
                _sign_step(self.params[i], local(self.grads[i]), factor, s, self.options)
        if adam:
            step = _kernels.foreach if foreach else _kernels.single
            step(self.moments.select(adam)._replace(gates=adam_gates), s, self.options)

    def _observe(self, indices: list[int], squares: Tensor, ok: Tensor) -> tuple[Tensor, Tensor]:
        """Advances the averages; the slow ones' old weights, and the gate of each tensor."""
        fast, slow, step = (
            torch.stack([column[i] for i in indices])
            for column in (self.fasts, self.slows, self.steps)
        )
        old = windows(fast, slow, step)
        new = filters.select(ok, tiers.observe(old, squares.sqrt(), xp=torch), old, xp=torch)
        for column, values in (
            (self.fasts, new.fast.value),
            (self.slows, new.slow.value),
            (self.steps, step + ok),
        ):
            _storage.assign([column[i] for i in indices], values.unbind())
        # A skipped step multiplies by 0 what a gradient that is not finite would have gated.
        return old.slow.weight, torch.where(ok, tiers.noise_gate(new, xp=torch), 0.0)

    def _relative(
        self, indices: list[int], squares: Tensor, weight: Tensor, ok: Tensor
    ) -> Sequence[Tensor | None]:
        """Advances the scalars of tier 1; their factor on each tensor's sign, else `None`."""
        places = [place for place, i in enumerate(indices) if self.scalars[i] is not None]
        if not places:
            return [None] * len(indices)
        kept = [scalar for i in indices if (scalar := self.scalars[i]) is not None]
        old = torch.stack(kept)
        new = tiers.averaged_square(old, weight[places], squares[places])
        new = torch.where(ok, new, old)
        _storage.assign(kept, new.unbind())
        peers = [peer.to(new.device) for peer in self.peers]
        mean = torch.cat([new, torch.stack(peers)]).mean() if peers else new.mean()
        factors: list[Tensor | None] = [None] * len(indices)
        relative = tiers.relative_scale(new, mean, xp=torch)
        for place, factor in zip(places, relative.unbind(), strict=True):
            factors[place] = factor
        return factors


def _sign_step(p: Kept, g: Tensor, factor: Tensor, s: Scalars, o: Options) -> None:
    """`p <- p - rate (factor 0.2 sign(g) + weight_decay p)`."""
    dtype = compute_dtype(p)
    for g_block, p_block in _kernels.blocks(g, p):
        (theta,) = _storage.read([p_block], [dtype])
        u = (torch.where(s.ok, g_block, 0).to(dtype) * s.scale).sign() * (tiers.SIGN_STEP * factor)
        if o.weight_decay:
            u = u + o.weight_decay * theta
        _storage.write([p_block], [theta - s.rate * u], s.key, s.ok)


def _mean_square(grad: Tensor) -> Tensor:
    """Of the raw gradient, over all ranks; float32."""
    part = local(grad)
    norm = torch.linalg.vector_norm(part, dtype=compute_dtype(part))
    return (over_ranks(norm.square(), grad) / max(1, grad.numel())).float()


def windows(fast: Tensor, slow: Tensor, step: Tensor) -> filters.Windows:
    """The averages of some tensors, filled as far as their steps say: to `1 - decay^step`."""
    weights = (-torch.expm1(step * math.log(decay)) for decay in (FAST_DECAY, SLOW_DECAY))
    return filters.Windows(*map(filters.Ema, (fast, slow), weights))
