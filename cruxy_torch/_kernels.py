"""The update of Adam and Lion, tensor by tensor (the reference) and by torch's foreach calls.

Everything the controller decides arrives here as 0-d tensors, so nothing waits for the device and
nothing is compiled anew when a value changes. A gradient is read and never written to.
"""

# torch's foreach calls are what torch.optim itself is built on, underscore and all.
# pyright: reportPrivateImportUsage=false

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 1 << 22
"""Elements treated at a time where temporaries are needed: they stay below 16 MiB each."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Tensors(NamedTuple):
    """Parameters with all that belongs to them, one list per kind.

    Attributes:
        params: the parameters.
        grads: their raw gradients.
        exp_avgs: first moments, or Lion's momentum.
        exp_avg_sqs: second moments; empty for Lion.
        clocks1: how far each first moment has filled, float32 of shape `()`: the product of its
            decay rates so far, or the number of its steps (`Options.power`); empty for Lion.
        clocks2: the same of the second moment; empty where `clocks1` holds steps.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    clocks1: list[Tensor]
    clocks2: list[Tensor]

    def select(self, indices: list[int]) -> "Tensors":
        """The same lists with only these parameters, given in order."""
        if len(indices) == len(self.params):
            return self
        return Tensors(*([column[i] for i in indices] if column else [] for column in self))


class Scalars(NamedTuple):
    """What one step applies to a group: scalars of the controller's namespace.

    They are float32 but for `ok`. The C library takes them as numbers, everything else as tensors.

    Attributes:
        rate: the learning rate with all its factors.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        scale: factor on the raw gradient: clipping, loss scaling and the sign of `maximize`.
        ok: whether the step counts; where false the other four leave everything as it is.
    """

    rate: Any
    beta1: Any
    beta2: Any
    scale: Any
    ok: Any

    def to(self, device: torch.device) -> "Scalars":
        """The same as 0-d tensors on a device."""
        if isinstance(self.ok, Tensor):
            return Scalars(*(value.to(device, non_blocking=True) for value in self))
        rate, beta1, beta2, scale = torch.tensor(
            [float(value) for value in self[:4]], device=device
        ).unbind()
        ok = torch.full((), bool(self.ok), device=device)
        return Scalars(rate, beta1, beta2, scale, ok)


class Options(NamedTuple):
    """What a parameter group fixes.

    Attributes:
        lion: Lion instead of Adam.
        weight_decay: its coefficient.
        coupled: adds it to the gradient (L2) instead of to the update; Lion never does.
        eps: added to the root of the second moment.
        nesterov: the numerator is `beta1 m + (1 - beta1) g` instead of `m`.
        centralize: subtracts from a gradient of two or more axes its mean over all but the first.
        power: the bias correction of `cruxy` 2.1.0: today's decay rate to the power of the step,
            applied outside `eps`, and the same for the Nesterov numerator as for `m`.
    """

    lion: bool
    weight_decay: float
    coupled: bool
    eps: float
    nesterov: bool
    centralize: bool
    power: bool


def single(tensors: Tensors, scalars: Scalars, options: Options) -> None:
    """One step, tensor by tensor: the readable version that the others are held to."""
    if options.lion:
        columns = (tensors.params, tensors.grads, tensors.exp_avgs)
        for column in zip(*columns, strict=True):
            for p, g, m in blocks(*column):
                _lion(p, g, m, scalars, options)
        return
    factors = _bias_correction(tensors, scalars, options)
    columns = (tensors.params, tensors.grads, tensors.exp_avgs, tensors.exp_avg_sqs)
    for *column, gain, spread, eps in zip(*columns, *factors, strict=True):
        for p, g, m, v in blocks(*column):
            _adam(p, g, m, v, gain, spread, eps, scalars, options)


def _lion(p: Tensor, g: Tensor, m: Tensor, s: Scalars, o: Options) -> None:
    """WP 11-13."""
    x = _gradient(p, g, s, o)
    momentum = m.to(x.dtype)
    u = (s.beta1 * momentum + (1.0 - s.beta1) * x).sign_()
    m.copy_(s.beta2 * momentum + (1.0 - s.beta2) * x)
    _apply(p, u, s, o)


def _adam(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    gain: Tensor,
    spread: Tensor,
    eps: Tensor,
    s: Scalars,
    o: Options,
) -> None:
    x = _gradient(p, g, s, o)
    u = s.beta1 * m.to(x.dtype) + (1.0 - s.beta1) * x
    m.copy_(u)
    v.mul_(s.beta2).addcmul_(x * (1.0 - s.beta2), x)
    if o.nesterov:
        u = s.beta1 * u + (1.0 - s.beta1) * x
    _apply(p, u * gain / ((v * spread).sqrt_() + eps), s, o)


def _gradient(p: Tensor, g: Tensor, s: Scalars, o: Options) -> Tensor:
    """The gradient that enters the moments; zero on a skipped step, since 0 * NaN is NaN."""
    x = torch.where(s.ok, g, 0).to(compute_dtype(p)) * s.scale
    if o.centralize:
        x = centralized(x)
    return x + o.weight_decay * p if o.coupled else x


def _apply(p: Tensor, u: Tensor, s: Scalars, o: Options) -> None:
    """`p <- p - rate (u + weight_decay p)` (WP 7, 13)."""
    if o.weight_decay and not o.coupled:
        u = u + o.weight_decay * p
    p.copy_(p - s.rate * u)


def _bias_correction(
    tensors: Tensors, s: Scalars, o: Options
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Advances the clocks; per tensor the factors on the numerator and on `v`, and `eps`.

    With moving decay rates the normaliser of the first moment is one minus the product of all of
    them, of the Nesterov numerator one minus that product times today's. `Options.power` takes
    today's to the power of the step instead.
    """
    clock = torch.stack(tensors.clocks1)
    if o.power:
        clock = clock + s.ok
        product1, product2 = s.beta1**clock, s.beta2**clock
    else:
        clock = product1 = clock * s.beta1
        product2 = torch.stack(tensors.clocks2) * s.beta2
        assign(tensors.clocks2, product2.unbind())
    assign(tensors.clocks1, clock.unbind())
    if o.nesterov and not o.power:
        product1 = product1 * s.beta1
    gain, spread = 1.0 / _seen(product1), 1.0 / _seen(product2)
    eps = o.eps * (spread.sqrt() if o.power else torch.ones_like(spread))
    # A skipped step multiplies what comes out by 0, which 0 / 0 would survive.
    eps = torch.where(s.ok, eps, 1.0)
    return gain.unbind(), spread.unbind(), eps.unbind()


def _seen(product: Tensor) -> Tensor:
    """The weight of what a moment has seen, `1 - product`; 1 where it has seen nothing."""
    return torch.where(product < 1.0, 1.0 - product, 1.0)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What a tensor's arithmetic runs in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of equally shaped tensors along the first axis, `BLOCK` elements or one row each."""
    first = tensors[0]
    if first.numel() <= BLOCK or first.ndim == 0:
        yield tensors
        return
    rows = max(1, BLOCK * len(first) // first.numel())
    yield from zip(*(t.split(rows) for t in tensors), strict=True)


def foreach(tensors: Tensors, scalars: Scalars, options: Options) -> None:
    """One step by torch's foreach calls, a bucket of like tensors at a time."""
    for indices in buckets(tensors.params, tensors.grads, tensors.exp_avgs):
        part = tensors.select(indices)
        xs = _foreach_gradients(part, scalars, options)
        if options.lion:
            us = _foreach_mix(part.exp_avgs, xs, scalars.beta1)
            torch._foreach_sign_(us)
            assign(part.exp_avgs, _foreach_mix(part.exp_avgs, xs, scalars.beta2))
        else:
            us = _foreach_adam(part, xs, scalars, options)
        del xs
        ps = widened(part.params)
        if options.weight_decay and not options.coupled:
            torch._foreach_add_(us, ps, alpha=options.weight_decay)
        torch._foreach_mul_(us, scalars.rate)
        assign(part.params, torch._foreach_sub(ps, us))


def _foreach_adam(part: Tensors, xs: list[Tensor], s: Scalars, o: Options) -> list[Tensor]:
    gains, spreads, epses = _bias_correction(part, s, o)
    us = _foreach_mix(part.exp_avgs, xs, s.beta1)
    assign(part.exp_avgs, us)
    squares = torch._foreach_mul(xs, xs)
    torch._foreach_mul_(squares, 1.0 - s.beta2)
    torch._foreach_mul_(part.exp_avg_sqs, s.beta2)
    torch._foreach_add_(part.exp_avg_sqs, squares)
    del squares
    if o.nesterov:
        us = _foreach_mix(us, xs, s.beta1)
    torch._foreach_mul_(us, gains)
    denominators = torch._foreach_mul(part.exp_avg_sqs, spreads)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, epses)
    torch._foreach_div_(us, denominators)
    return us


def _foreach_gradients(part: Tensors, s: Scalars, o: Options) -> list[Tensor]:
    # NaN times 0 is NaN, but the bits of any number times the integer 0 are those of +0.
    bits = [g.view(_BITS[g.element_size()]) for g in part.grads]
    masked = torch._foreach_mul(bits, s.ok.to(bits[0].dtype))
    xs = [b.view(g.dtype) for b, g in zip(masked, part.grads, strict=True)]
    xs = [x.to(compute_dtype(p)) for x, p in zip(xs, part.params, strict=True)]
    torch._foreach_mul_(xs, s.scale)
    if o.centralize:
        xs = [centralized(x) for x in xs]
    if o.coupled and o.weight_decay:
        torch._foreach_add_(xs, widened(part.params), alpha=o.weight_decay)
    return xs


def _foreach_mix(averages: list[Tensor], xs: list[Tensor], beta: Tensor) -> list[Tensor]:
    """`beta m + (1 - beta) x` as new tensors."""
    mixed = torch._foreach_mul(xs, 1.0 - beta)
    old = [m.to(x.dtype) for m, x in zip(averages, xs, strict=True)]
    torch._foreach_add_(mixed, torch._foreach_mul(old, beta))
    return list(mixed)


def widened(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in the dtype their arithmetic runs in; themselves where it is theirs."""
    return [t.to(compute_dtype(t)) for t in tensors]


def assign(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies each value into its target."""
    if not torch.compiler.is_compiling():
        torch._foreach_copy_(list(targets), list(values))
        return
    # Inductor 2.13 moves a foreach copy in front of what still reads the old values.
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def buckets(*columns: list[Tensor]) -> Iterator[list[int]]:
    """Indices of tensors alike in device and dtypes, at most `BLOCK` elements (or one) together.

    The temporaries of a foreach call are then those of a bucket, not of the whole model.
    """
    open_buckets: dict[tuple, tuple[list[int], int]] = {}
    for index, row in enumerate(zip(*columns, strict=True)):
        kind = tuple((t.device, t.dtype) for t in row)
        indices, size = open_buckets.get(kind, ([], 0))
        if indices and size + row[0].numel() > 4 * BLOCK:
            yield indices
            indices, size = [], 0
        open_buckets[kind] = ([*indices, index], size + row[0].numel())
    for indices, _ in open_buckets.values():
        yield indices


def centralized(x: Tensor) -> Tensor:
    """The tensor less its mean over all axes but the first; one of fewer axes as it is."""
    if x.ndim < 2:
        return x
    axes = tuple(range(1, x.ndim))
    if torch.compiler.is_compiling():
        # Inductor on CPU cannot compile a plain mean in front of an in-place update
        # (pytorch/pytorch#196570).
        return x - torch.var_mean(x, axes, correction=0, keepdim=True)[1]
    return x - x.mean(axes, keepdim=True)
