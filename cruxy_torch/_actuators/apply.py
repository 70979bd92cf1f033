"""The update of Adam and Lion, tensor by tensor (the reference) and by torch's foreach calls.

Everything the controller decides arrives here as 0-d tensors, so nothing waits for the device and
nothing is compiled anew when a value changes. A gradient is read and never written to.
"""

# torch's foreach calls are what torch.optim itself is built on, underscore and all.
# pyright: reportPrivateImportUsage=false

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cruxy_torch import _kept as _storage
from cruxy_torch._kept import Coded, Kept, assign, compute_dtype

BLOCK = 1 << 22
"""Elements treated at a time where temporaries are needed: they stay below 16 MiB each."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Tensors(NamedTuple):
    """Parameters with all that belongs to them, one list per kind.

    All but gradients and clocks may be kept in fewer bits, see `_storage`.

    Attributes:
        params: the parameters.
        grads: their raw gradients.
        exp_avgs: first moments, or Lion's momentum.
        exp_avg_sqs: second moments; empty for Lion.
        clocks1: how far each first moment has filled, float32 of shape `()`: the product of its
            decay rates so far, or the number of its steps (`Options.power`); empty for Lion.
        clocks2: the same of the second moment; empty where `clocks1` holds steps.
        gates: factors on Adam's direction of each; empty for none.
        limits: the largest rate of each, float32 of shape `()`; empty for none.
        averages: the average of each parameter, float32 or float64; empty for none.
    """

    params: list[Kept]
    grads: list[Tensor]
    exp_avgs: list[Kept]
    exp_avg_sqs: list[Kept]
    clocks1: list[Tensor]
    clocks2: list[Tensor]
    gates: Sequence[Tensor] = ()
    limits: Sequence[Tensor] = ()
    averages: Sequence[Tensor] = ()

    def select(self, indices: list[int]) -> "Tensors":
        """The same lists with only these parameters, given in order."""
        if len(indices) == len(self.params):
            return self
        columns: Iterator[list[Any]]
        columns = ([column[i] for i in indices] if column else [] for column in self)
        return Tensors(*columns)


class Scalars(NamedTuple):
    """What one step applies to a group: scalars of the controller's namespace.

    They are float32 but for `ok` and `key`. The C library takes them as numbers, everything else
    as tensors.

    Attributes:
        rate: the learning rate with all its factors.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        scale: factor on the raw gradient: clipping, loss scaling and the sign of `maximize`.
        ok: whether the step counts; where false the four before leave everything as it is.
        key: of this step's random bits, int32.
        limits: the largest rate of each tensor of the group, a vector; `None` for no limit.
        average_weight: the weight of the new parameters in their average.
    """

    rate: Any
    beta1: Any
    beta2: Any
    scale: Any
    ok: Any
    key: Any
    limits: Any = None
    average_weight: Any = 0.0

    def guarded(self, ok: Any, factor: Any, *, xp: Any) -> "Scalars":
        """The same for a gradient that counts where `ok`, and then is multiplied by `factor`."""
        return self._replace(
            rate=xp.where(ok, self.rate, 0.0),
            beta1=xp.where(ok, self.beta1, 1.0),
            beta2=xp.where(ok, self.beta2, 1.0),
            scale=self.scale * xp.where(ok, factor, 1.0),
            ok=ok,
        )

    def to(self, device: torch.device) -> "Scalars":
        """The same as 0-d tensors on a device."""
        if isinstance(self.ok, Tensor):
            return Scalars(
                *(v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for v in self)
            )
        numbers = [float(value) for value in (*self[:4], self.average_weight)]
        rate, beta1, beta2, scale, weight = torch.tensor(numbers, device=device).unbind()
        ok = torch.full((), bool(self.ok), device=device)
        limits = None if self.limits is None else self.limits.to(device)
        return Scalars(rate, beta1, beta2, scale, ok, int(self.key), limits, weight)

    def of(self, tensors: Tensors, index: int) -> "Scalars":
        """The same with the rate of one tensor."""
        if not tensors.limits:
            return self
        limit = tensors.limits[index].to(self.rate.device)
        return self._replace(rate=torch.minimum(self.rate, limit))


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
        columns = (tensors.grads, tensors.params, tensors.exp_avgs)
        for i, column in enumerate(zip(*columns, strict=True)):
            for g, p, m in blocks(*column):
                _lion(p, g, m, scalars.of(tensors, i), options)
        return
    factors = _bias_correction(tensors, scalars, options)
    columns = (tensors.grads, tensors.params, tensors.exp_avgs, tensors.exp_avg_sqs)
    for i, (*column, gain, spread, eps) in enumerate(zip(*columns, *factors, strict=True)):
        for g, p, m, v in blocks(*column):
            _adam(p, g, m, v, gain, spread, eps, scalars.of(tensors, i), options)


def _lion(p: Kept, g: Tensor, m: Kept, s: Scalars, o: Options) -> None:
    """WP 11-13."""
    dtype = compute_dtype(p)
    theta, momentum = _read(p, dtype), _read(m, dtype)
    x = _gradient(theta, g, s, o)
    u = (s.beta1 * momentum + (1.0 - s.beta1) * x).sign_()
    _write(m, s.beta2 * momentum + (1.0 - s.beta2) * x, s)
    _apply(p, theta, u, s, o)


def _adam(
    p: Kept,
    g: Tensor,
    m: Kept,
    v: Kept,
    gain: Tensor,
    spread: Tensor,
    eps: Tensor,
    s: Scalars,
    o: Options,
) -> None:
    dtype = compute_dtype(p)
    theta = _read(p, dtype)
    x = _gradient(theta, g, s, o)
    u = s.beta1 * _read(m, dtype) + (1.0 - s.beta1) * x
    _write(m, u, s)
    square = _read(v, dtype)
    square.mul_(s.beta2).addcmul_(x * (1.0 - s.beta2), x)
    _write(v, square, s)
    if o.nesterov:
        u = s.beta1 * u + (1.0 - s.beta1) * x
    _apply(p, theta, u * gain / ((square * spread).sqrt_() + eps), s, o)


def _gradient(theta: Tensor, g: Tensor, s: Scalars, o: Options) -> Tensor:
    """The gradient that enters the moments; zero on a skipped step, since 0 * NaN is NaN."""
    x = torch.where(s.ok, g, 0).to(theta.dtype) * s.scale
    if o.centralize:
        x = centralized(x)
    return x + o.weight_decay * theta if o.coupled else x


def _apply(p: Kept, theta: Tensor, u: Tensor, s: Scalars, o: Options) -> None:
    """`p <- p - rate (u + weight_decay p)` (WP 7, 13); `theta` is the value of `p`."""
    if o.weight_decay and not o.coupled:
        u = u + o.weight_decay * theta
    _write(p, theta - s.rate * u, s)


def _read(kept: Kept, dtype: torch.dtype) -> Tensor:
    return _storage.read([kept], [dtype])[0]


def _write(kept: Kept, value: Tensor, s: Scalars) -> None:
    _storage.write([kept], [value], s.key, s.ok)


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
    gain, spread = 1.0 / seen(product1), 1.0 / seen(product2)
    eps = o.eps * (spread.sqrt() if o.power else torch.ones_like(spread))
    # A skipped step multiplies what comes out by 0, which 0 / 0 would survive.
    eps = torch.where(s.ok, eps, 1.0)
    if tensors.gates:
        gain = gain * torch.stack(list(tensors.gates))
    return gain.unbind(), spread.unbind(), eps.unbind()


def seen(product: Tensor) -> Tensor:
    """The weight of what a moment has seen, `1 - product`; 1 where it has seen nothing."""
    return torch.where(product < 1.0, 1.0 - product, 1.0)


def by_device(tensors: Sequence[Kept]) -> dict[torch.device, list[int]]:
    """Indices of the tensors on each device."""
    indices: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        indices.setdefault(tensor.device, []).append(index)
    return indices


def blocks(first: Tensor, *others: Kept) -> Iterator[tuple[Any, ...]]:
    """Views of equally shaped tensors along the first axis, `BLOCK` elements or one row each.

    Where one of them is coded, enough rows to fill whole blocks of codes.
    """
    if first.numel() <= BLOCK or first.ndim == 0:
        yield first, *others
        return
    row = first.numel() // len(first)
    rows = max(1, BLOCK // row)
    if any(isinstance(kept, Coded) for kept in others):
        whole = _storage.BLOCK_SIZE // math.gcd(row, _storage.BLOCK_SIZE)
        rows = max(1, rows // whole) * whole
    yield from zip(first.split(rows), *(kept.split(rows) for kept in others), strict=True)


def foreach(tensors: Tensors, scalars: Scalars, options: Options) -> None:
    """One step by torch's foreach calls, a bucket of like tensors at a time."""
    moments = [column for column in (tensors.exp_avgs, tensors.exp_avg_sqs) if column]
    for indices in buckets(tensors.grads, tensors.params, *moments):
        part = tensors.select(indices)
        if len(indices) == 1:
            # As many calls, and temporaries of a block instead of the whole tensor.
            single(part, scalars, options)
            continue
        dtypes = [compute_dtype(p) for p in part.params]
        thetas = _storage.read(part.params, dtypes)
        xs = _foreach_gradients(part, thetas, scalars, options)
        momenta = _storage.read(part.exp_avgs, dtypes)
        if options.lion:
            us = _foreach_mix(momenta, xs, scalars.beta1)
            torch._foreach_sign_(us)
            momenta = _foreach_mix(momenta, xs, scalars.beta2)
            _storage.write(part.exp_avgs, momenta, scalars.key, scalars.ok)
        else:
            us = _foreach_adam(part, momenta, xs, scalars, options)
        del xs, momenta
        if options.weight_decay and not options.coupled:
            torch._foreach_add_(us, thetas, alpha=options.weight_decay)
        if part.limits:
            torch._foreach_mul_(us, [scalars.of(part, i).rate for i in range(len(us))])
        else:
            torch._foreach_mul_(us, scalars.rate)
        new = torch._foreach_sub(thetas, us)
        _storage.write(part.params, new, scalars.key, scalars.ok)


def _foreach_adam(
    part: Tensors, momenta: list[Tensor], xs: list[Tensor], s: Scalars, o: Options
) -> list[Tensor]:
    gains, spreads, epses = _bias_correction(part, s, o)
    us = _foreach_mix(momenta, xs, s.beta1)
    _storage.write(part.exp_avgs, us, s.key, s.ok)
    squares = torch._foreach_mul(xs, xs)
    torch._foreach_mul_(squares, 1.0 - s.beta2)
    averages = _storage.read(part.exp_avg_sqs, [x.dtype for x in xs])
    torch._foreach_mul_(averages, s.beta2)
    torch._foreach_add_(averages, squares)
    _storage.write(part.exp_avg_sqs, averages, s.key, s.ok)
    del squares
    if o.nesterov:
        us = _foreach_mix(us, xs, s.beta1)
    torch._foreach_mul_(us, gains)
    denominators = torch._foreach_mul(averages, spreads)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, epses)
    torch._foreach_div_(us, denominators)
    return us


def _foreach_gradients(part: Tensors, thetas: list[Tensor], s: Scalars, o: Options) -> list[Tensor]:
    # NaN times 0 is NaN, but the bits of any number times the integer 0 are those of +0.
    bits = [g.view(_BITS[g.element_size()]) for g in part.grads]
    masked = torch._foreach_mul(bits, s.ok.to(bits[0].dtype))
    xs = [b.view(g.dtype) for b, g in zip(masked, part.grads, strict=True)]
    xs = [x.to(theta.dtype) for x, theta in zip(xs, thetas, strict=True)]
    torch._foreach_mul_(xs, s.scale)
    if o.centralize:
        xs = [centralized(x) for x in xs]
    if o.coupled and o.weight_decay:
        torch._foreach_add_(xs, thetas, alpha=o.weight_decay)
    return xs


def _foreach_mix(averages: list[Tensor], xs: list[Tensor], beta: Tensor) -> list[Tensor]:
    """`beta m + (1 - beta) x` as new tensors."""
    mixed = torch._foreach_mul(xs, 1.0 - beta)
    torch._foreach_add_(mixed, torch._foreach_mul(averages, beta))
    return list(mixed)


def widened(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in the dtype their arithmetic runs in; themselves where it is theirs."""
    return [t.to(compute_dtype(t)) for t in tensors]


def buckets(first: list[Tensor], *others: list[Kept]) -> Iterator[list[int]]:
    """Indices of tensors kept alike, at most `4 * BLOCK` elements (or one tensor) together.

    The temporaries of a foreach call are then those of a bucket, not of the whole model.
    """
    open_buckets: dict[tuple, tuple[list[int], int]] = {}
    for index, row in enumerate(zip(first, *others, strict=True)):
        kind = tuple(map(_storage.kind, row))
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


def average(tensors: Tensors, weight: Any) -> None:
    """Moves the average of each parameter, where there is one, this share of the way to it."""
    if not tensors.averages:
        return
    for param, mean in zip(tensors.params, tensors.averages, strict=True):
        for p, block in blocks(_storage.held(param), mean):
            value = weight.to(mean.device) if isinstance(weight, Tensor) else float(weight)
            block.lerp_(p.to(mean.dtype), value)
