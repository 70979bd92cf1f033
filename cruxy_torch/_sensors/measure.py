"""From the raw gradients of all parameters to the two norms and the loss that a law sees."""

# torch's foreach calls are what torch.optim itself is built on, underscore and all.
# pyright: reportPrivateImportUsage=false

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_control import Signals
from cruxy_control.signals import alignment, momentum_ratio
from cruxy_torch._blocks import blocks, buckets
from cruxy_torch._distributed.shards import by_mesh, local, over_mesh
from cruxy_torch._kept import Kept, compute_dtype, plain, raw, read
from cruxy_torch._native.fit import Passes, SetAsideError
from cruxy_torch._near import numbers_of


def sums(
    grads: list[Tensor],
    gamma: float,
    scale: Tensor,
    momenta: Sequence[tuple[Kept, float]] | None = None,
    *,
    native: Passes | None,
    foreach: bool,
    sized: Any = None,
) -> Tensor:
    """`sum g^2` and `sum |g|^gamma` over plain tensors, multiplied by `scale` first (WP 1).

    Args:
        grads: raw gradients, on any devices and of any real dtypes.
        gamma: the exponent.
        scale: factor on every gradient (one over the loss scale); 0-d.
        momenta: see `products`, whose sums are appended; `None` for none.
        native: a library that takes what it can take; `None` for none.
        foreach: takes torch's foreach calls for the rest.
        sized: see `measure_sums`.

    Returns:
        All as one float32 vector on the device of `scale`. Each tensor's sum is taken in float32,
        or in float64 for a float64 gradient.
    """
    totals = []
    if native is not None and sized is not None:
        with contextlib.suppress(SetAsideError):
            total, slow = sized.sums(grads, gamma, scale, momenta)
            totals += [] if total is None else [total]
            grads, momenta = _at(grads, slow), _at(momenta, slow)
    elif native is not None:
        moments = [] if momenta is None else [[kept for kept, _ in momenta]]
        fast, slow = native.parts([grads], moments)
        for part in fast:
            try:
                totals.append(native.sums(_at(grads, part), gamma, scale, _at(momenta, part)))
            except SetAsideError:
                slow = [*slow, *part]
        grads, momenta = _at(grads, slow), _at(momenta, slow)
    if grads or not totals:
        totals.append(_sums(grads, gamma, scale, momenta, foreach=foreach))
    return _added(totals)


def _added(vectors: list[Tensor]) -> Tensor:
    return vectors[0] if len(vectors) == 1 else torch.stack(vectors).sum(0)


def _at(column: Any, indices: list[int]) -> Any:
    return None if column is None else [column[i] for i in indices]


def _sums(
    grads: list[Tensor],
    gamma: float,
    scale: Tensor,
    momenta: Sequence[tuple[Kept, float]] | None,
    *,
    foreach: bool,
) -> Tensor:
    """`sums` without a library."""
    parts = _foreach_parts if foreach else _single_parts
    norms = [
        torch.stack(pair).to(scale.device, torch.float32, non_blocking=True)
        for pair in parts(grads, gamma, scale)
    ]
    total = _added(norms or [torch.zeros(2, dtype=torch.float32, device=scale.device)])
    return total if momenta is None else torch.cat((total, products(grads, momenta, scale)))


def _single_parts(grads: list[Tensor], gamma: float, scale: Tensor) -> list[tuple[Tensor, Tensor]]:
    parts = []
    for grad in grads:
        for (g,) in blocks(grad):
            a = (g.to(compute_dtype(g)) * scale.to(g.device)).abs_()
            parts.append((a.square().sum(), _power(a, gamma).sum()))
    return parts


def _power(a: Tensor, gamma: float) -> Tensor:
    """`a^gamma` of non-negative `a`; `pow` costs several times a root."""
    if gamma == 2.0:
        return a.square()
    return a * a.sqrt() if gamma == 1.5 else a**gamma


def _foreach_parts(grads: list[Tensor], gamma: float, scale: Tensor) -> list[tuple[Tensor, Tensor]]:
    parts = []
    for indices in buckets(grads):
        bucket = [grads[i].to(compute_dtype(grads[i])) for i in indices]
        sizes = torch._foreach_abs(bucket)
        torch._foreach_mul_(sizes, scale.to(bucket[0].device))
        squares = torch._foreach_norm(torch._foreach_mul(sizes, sizes), 1)
        if gamma == 2.0:
            powers = squares
        elif gamma == 1.5:
            powers = torch._foreach_norm(torch._foreach_mul(sizes, torch._foreach_sqrt(sizes)), 1)
        else:
            powers = torch._foreach_norm(torch._foreach_pow(sizes, gamma), 1)
        parts.append((torch.stack(squares).sum(), torch.stack(powers).sum()))
    return parts


def products(
    grads: Sequence[Tensor], momenta: Sequence[tuple[Kept, float]], scale: Tensor
) -> Tensor:
    """`sum g m` and `sum m^2` over plain tensors, the gradients multiplied by `scale` first.

    Args:
        grads: raw gradients.
        momenta: their first moments before the step, as they are kept, each with its sign: -1
            where it is that of the negative gradient, else 1.
        scale: factor on every gradient; 0-d.

    Returns:
        Both as one float32 vector on the device of `scale`.
    """
    totals = [torch.zeros(2, dtype=torch.float32, device=scale.device)]
    for grad, (kept, sign) in zip(grads, momenta, strict=True):
        dtype = compute_dtype(grad)
        (moment,) = read([kept], [dtype])
        moment = moment.reshape(-1)
        along = torch.dot(grad.to(dtype).reshape(-1), moment) * sign
        pair = torch.stack((along, torch.dot(moment, moment)))
        totals.append(pair.to(scale.device, torch.float32, non_blocking=True))
    total = torch.stack(totals).sum(0)
    return torch.stack((total[0] * scale, total[1]))


def excess(
    grads: Sequence[Tensor], averaged: Sequence[tuple[Kept, Kept] | None], scale: Tensor
) -> Tensor:
    """`sum g (p - average)` over plain tensors, the gradients multiplied by `scale` first.

    Args:
        grads: raw gradients.
        averaged: the parameter of each, as it is kept, with its average; `None` for none.
        scale: factor on every gradient; 0-d.

    Returns:
        A float32 vector of one on the device of `scale`.
    """
    totals = [torch.zeros((), dtype=torch.float32, device=scale.device)]
    for grad, pair in zip(grads, averaged, strict=True):
        for g, p, mean in () if pair is None else blocks(grad, *pair):
            wide = compute_dtype(p)
            (near,) = read([p], [wide])
            way = near - numbers_of(raw(p), mean).to(wide)
            along = torch.dot(g.to(wide).reshape(-1), way.reshape(-1))
            totals.append(along.to(scale.device, torch.float32, non_blocking=True))
    return (torch.stack(totals).sum() * scale).reshape(1)


def measure_sums(
    grads: list[Tensor],
    loss: Tensor,
    gamma: float,
    *,
    momenta: Sequence[tuple[Kept, float] | None] | None = None,
    averaged: Sequence[tuple[Kept, Kept] | None] | None = None,
    scale: Tensor,
    found_inf: Tensor | None,
    process_group: dist.ProcessGroup | None,
    native: Passes | None,
    foreach: bool,
    sized: Any = None,
) -> tuple[Tensor, Tensor]:
    """What the law's signals are computed of, the same on every rank that shares the parameters.

    A `DTensor` is measured on its local shard; one all-reduce over its mesh makes the sums global
    and averages the loss over the ranks that have a finite one. Plain gradients count as
    replicated: with `process_group` (or beside a mesh) their sums are averaged over the ranks.

    Args:
        grads: raw gradients, plain or `DTensor`.
        loss: this rank's loss, float32, 0-d, NaN where there is none.
        gamma: the law's exponent.
        momenta: see `products`, this rank's shards of them, where the alignment is asked for;
            `None` for a gradient that is left out of it.
        averaged: see `excess`, this rank's shards, where that is asked for beside the alignment.
        scale: factor on every gradient; 0-d, float32.
        found_inf: what a `GradScaler` found, positive where the step is to be skipped.
        process_group: ranks that hold the same gradients but a loss of their own.
        native: a library that takes what it can take; `None` for none.
        foreach: takes torch's foreach calls for the rest.
        sized: what a library measures besides, see `Passes.together`; `None` for nothing.

    Returns:
        The sums that `signals` takes, and the loss, NaN or not finite where there is none.
    """

    def own_sums(indices: list[int], *, steers: bool) -> Tensor:
        chosen = [local(grads[i]) for i in indices]
        own = _at(momenta, indices) if steers else None
        return sums(chosen, gamma, scale, own, native=native, foreach=foreach, sized=sized)

    def sums_of(indices: list[int]) -> Tensor:
        total = aligned_sums(indices)
        if averaged is None:
            return total
        total = total if len(total) > 4 else torch.cat((total, total[:1]))
        chosen = [local(grads[i]) for i in indices]
        return torch.cat((total, excess(chosen, _at(averaged, indices), scale)))

    def aligned_sums(indices: list[int]) -> Tensor:
        if momenta is None:
            return own_sums(indices, steers=False)
        total = own_sums([i for i in indices if momenta[i] is not None], steers=True)
        rest = [i for i in indices if momenta[i] is None]
        if alone and not rest:
            return total
        both = total[:2] + own_sums(rest, steers=False) if rest else total[:2]
        return torch.cat((both, total[2:], total[:1]))

    plain, sharded = by_mesh(grads)
    alone = not sharded and process_group is None
    total = sums_of(plain)
    if found_inf is not None:
        found = found_inf.to(total.device, non_blocking=True).sum() > 0
        total = torch.where(found, math.nan, total)
    if alone:
        return total, loss
    total, losses = _pooled(total, _counted(loss), sharded, sums_of)
    if process_group is not None:
        packed = torch.cat([total / dist.get_world_size(process_group), losses])
        dist.all_reduce(packed, group=process_group)
        total, losses = packed[:-2], packed[-2:]
    return total, _mean(losses)


def whole_sums(grad: Tensor, gamma: float, scale: Tensor, *, native: Passes | None) -> Tensor:
    """The two sums over one gradient, of a `DTensor` over all its shards; float32, `(2,)`."""

    def sums_of(indices: list[int]) -> Tensor:
        return sums([local(grad) for _ in indices], gamma, scale, native=native, foreach=False)

    plain, sharded = by_mesh([grad])
    total = sums_of(plain)
    return _pooled(total, torch.zeros_like(total), sharded, sums_of)[0]


def conclude(total: Tensor, loss: Tensor, meshes: Iterable[Any], gamma: float) -> Signals:
    """The signals of sums that are whole already and of this rank's loss."""
    nothing = torch.zeros_like(total)
    _, losses = _pooled(nothing, _counted(loss), {m: {} for m in meshes}, lambda _: nothing)
    return signals(total, _mean(losses), gamma)


def signals(total: Any, loss: Any, gamma: float, *, xp: Any = torch) -> Signals:
    """The two norms of which `total` has the sums, the loss, and the alignment if it has that.

    Args:
        total: a vector, or its numbers: `sum g^2`, `sum |g|^gamma`, `sum g m`, `sum m^2`, and
            `sum g^2` of those gradients alone that have moments where it is another, and the sum
            of `excess` where a law wants that.
        loss: NaN or not finite where there is none.
        gamma: the exponent.
        xp: the array namespace.
    """
    total = plain(total) if isinstance(total, Tensor) else total
    loss = xp.where(xp.isfinite(loss), loss, math.nan)
    norms = {"grad_norm": total[0].sqrt(), "gamma_norm": total[1] ** (1.0 / gamma)}
    if len(total) == 2:
        return Signals(**norms, loss=loss)
    norm = total[4].sqrt() if len(total) > 4 else norms["grad_norm"]
    cosine = alignment(total[2], norm, total[3], xp=xp)
    ratio = momentum_ratio(total[3], norm, xp=xp)
    excess = total[5] if len(total) > 5 else None
    return Signals(**norms, loss=loss, alignment=cosine, momentum_ratio=ratio, excess=excess)


def _counted(loss: Tensor) -> Tensor:
    """A loss and the number 1; two zeros where it is not finite."""
    known = torch.isfinite(loss)
    return torch.stack([torch.where(known, loss, 0.0), known.to(torch.float32)])


def _mean(losses: Tensor) -> Tensor:
    """The mean of a sum and a number of losses, NaN of none."""
    return torch.where(losses[1] > 0.0, losses[0] / losses[1], math.nan)


def _pooled(
    total: Tensor,
    losses: Tensor,
    sharded: dict[Any, dict[int, list[int]]],
    sums_of: Callable[[list[int]], Tensor],
) -> tuple[Tensor, Tensor]:
    """Adds the shards of all ranks to what all ranks have, and the losses of all ranks."""
    for mesh, shares in sharded.items():
        total = total / mesh.size()
        for copies, shards in shares.items():
            total = total + sums_of(shards) / copies
        packed = torch.cat([total, losses])
        over_mesh(packed, mesh)
        total, losses = packed[:-2], packed[-2:]
    return total, losses
