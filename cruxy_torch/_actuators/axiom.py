"""AXIOM's update, tensor by tensor, in blocks that keep temporaries small."""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cruxy_control.formulas.factored import second_moment_decay, snr_factor, streak_factor
from cruxy_torch import _kept as _storage
from cruxy_torch._actuators import apply as _kernels
from cruxy_torch._actuators import factored as _factored
from cruxy_torch._actuators.apply import Scalars
from cruxy_torch._actuators.factored import over_ranks
from cruxy_torch._kept import Kept
from cruxy_torch._sensors.measure import local
from cruxy_torch._step import Group

SMALLEST_RMS = 1e-3
"""A tensor of a smaller root mean square moves as if it had this one (Adafactor, section 8)."""


class Tensors(NamedTuple):
    """Parameters that have a gradient with all that belongs to them, one list per kind.

    Attributes:
        params: this rank's parameters.
        grads: their raw gradients, a `DTensor` where the parameter is one.
        seconds: second moments, as `_factored.start` makes them.
        exp_avgs: averages of the normalised gradients; empty without momentum.
        steps: good steps of each; int32, `()`.
        products: of the decay rates of each average; float32, `()`; empty without momentum.
    """

    params: list[Kept]
    grads: list[Tensor]
    seconds: list[dict[str, Tensor]]
    exp_avgs: list[Kept]
    steps: list[Tensor]
    products: list[Tensor]

    def select(self, indices: list[int]) -> "Tensors":
        """The same lists with only these parameters, given in order."""
        columns: tuple[list[Any], ...] = tuple(self)
        return Tensors(*([column[i] for i in indices] if column else [] for column in columns))


class Options(NamedTuple):
    """What a parameter group fixes.

    Attributes:
        momentum: decay rate of the average of the normalised gradient; 0 for none.
        decay_rate: exponent of the second moment's decay.
        clip_rms: the largest root mean square of a normalised gradient; `None` for no limit.
        relative_step: multiplies a tensor's step by the tensor's root mean square.
        weight_decay: its coefficient.
        streak_boost: largest factor on coordinates whose sign persists; 1 for none.
        snr_floor: signal-to-noise ratio below which a row is damped; 0 for none.
    """

    momentum: float
    decay_rate: float
    clip_rms: float | None
    relative_step: bool
    weight_decay: float
    streak_boost: float
    snr_floor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxiomGroup(Group):
    """Parameters that have a gradient, with what AXIOM keeps of them."""

    tensors: Tensors
    options: Options

    def update(self, scalars: Scalars, *, native: bool, foreach: bool) -> None:
        """Updates parameters and state in place, tensor by tensor."""
        for device, indices in _kernels.by_device(self.grads).items():
            _update(self.tensors.select(indices), scalars.to(device), self.options)


def _update(tensors: Tensors, s: Scalars, o: Options) -> None:
    steps = torch.stack(tensors.steps)
    decays = torch.where(s.ok, second_moment_decay(steps, o.decay_rate, xp=torch), 1.0)
    _storage.assign(tensors.steps, (steps + s.ok).unbind())
    columns = (tensors.params, tensors.grads, tensors.seconds, decays.unbind())
    if not tensors.exp_avgs:
        for p, g, v, decay in zip(*columns, strict=True):
            _update_one(p, g, v, None, decay, None, s, o)
        return
    s = s._replace(beta1=torch.where(s.ok, o.momentum, 1.0))  # not the law's to move
    products = torch.stack(tensors.products) * s.beta1
    _storage.assign(tensors.products, products.unbind())
    gains = (1.0 / _kernels.seen(products)).unbind()
    for p, g, v, decay, m, gain in zip(*columns, tensors.exp_avgs, gains, strict=True):
        _update_one(p, g, v, m, decay, gain, s, o)


def _update_one(
    p: Kept,
    g: Tensor,
    v: dict[str, Tensor],
    m: Kept | None,
    decay: Tensor,
    gain: Tensor | None,
    s: Scalars,
    o: Options,
) -> None:
    kept = (p,) if m is None else (p, m)
    blocks = list(_kernels.blocks(local(g), *kept))
    u = _factored.normalise(g, [block[0] for block in blocks], v, decay, s.scale, s.ok)
    dtype = _storage.compute_dtype(p)
    squares = [u.squares]
    if o.relative_step:
        thetas = (_storage.read([block[1]], [dtype])[0] for block in blocks)
        squares.append(torch.stack([theta.square().sum() for theta in thetas]).sum())
    sizes = (over_ranks(torch.stack(squares), g) / max(1, g.numel())).sqrt().unbind()
    clip = 1.0 if o.clip_rms is None else 1.0 / (sizes[0] / o.clip_rms).clip(min=1.0)
    for i, block in enumerate(blocks):
        direction = u.block(i) * clip
        if gain is not None:
            direction = _with_momentum(direction, block[2], gain, g, s, o)
        if o.relative_step:
            direction = direction * sizes[1].clip(min=SMALLEST_RMS)
        (theta,) = _storage.read([block[1]], [dtype])
        if o.weight_decay:
            direction = direction + o.weight_decay * theta
        _storage.write([block[1]], [theta - s.rate * direction], s.key, s.ok)


def _with_momentum(
    u: Tensor, kept: Kept, gain: Tensor, g: Tensor, s: Scalars, o: Options
) -> Tensor:
    """The average of `u`, bias-corrected, louder where signs persist and softer where all is noise.

    As `u` has size 1, the average's square is the signal-to-noise ratio.
    """
    (average,) = _storage.read([kept], [u.dtype])
    average = s.beta1 * average + (1.0 - s.beta1) * u
    _storage.write([kept], [average], s.key, s.ok)
    m_hat = average * gain
    direction = m_hat
    if o.streak_boost > 1.0:
        direction = direction * streak_factor(m_hat, o.streak_boost, xp=torch)
    if o.snr_floor > 0.0:
        snr = m_hat.square()
        if g.ndim:
            snr = over_ranks(snr.sum(-1, keepdim=True), g, g.ndim - 1) / g.shape[-1]
        direction = direction * snr_factor(snr, o.snr_floor, xp=torch)
    return direction
