"""Optimizers, norm, clip and schedules with the same bits everywhere.

Functions of one tensor over the array namespace `xp`; rates and decays are Python numbers or
float32 arrays `()`. In JAX inside `jax.enable_x64(True)`. Products of decay rates are kept; no
`pow`.
"""

import math
from collections.abc import Sequence
from typing import Any

from cruxy_exact._namespace import cast, join, largest, replaceable
from cruxy_exact.arithmetic import (
    TINY,
    add,
    cos_pi,
    div,
    down,
    exp,
    f32,
    field,
    log,
    mul,
    opaque,
    power,
    reciprocal,
    settle,
    sqrt,
    sub,
    up,
)
from cruxy_exact.sums import total


def rounded(number: Any) -> Any:
    """A Python number as `f32`; an array as it is."""
    return f32(number) if isinstance(number, float | int) else number


def rest(decay: Any, *, xp: Any) -> Any:
    """`1 - decay`: rounded once for a Python number, a float32 difference for an array."""
    return f32(1.0 - decay) if isinstance(decay, float | int) else sub(1.0, decay, xp=xp)


def next_products(products: Sequence[Any], decays: Sequence[Any], *, xp: Any) -> tuple[Any, ...]:
    """The products of the decay rates after one more step; float32, `()`, 1 before the first."""
    pairs = zip(products, decays, strict=True)
    return tuple(mul(product, rounded(decay), xp=xp) for product, decay in pairs)


def adam_factors(product1: Any, product2: Any, *, xp: Any) -> tuple[Any, Any]:
    """The corrections of Adam's moments for their start at 0.

    Args:
        product1: of the decay rates of the first moment, this step's included.
        product2: of those of the second.
        xp: the array namespace.

    Returns:
        `1 / (1 - product1)` and `1 / sqrt(1 - product2)`.
    """
    return (
        reciprocal(1.0 - product1, xp=xp),
        reciprocal(sqrt(1.0 - product2, xp=xp), xp=xp),
    )


@replaceable
def adamw(
    p: Any,
    g: Any,
    m: Any,
    v: Any,
    factors: tuple[Any, Any],
    *,
    lr: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: float = 1e-8,
    weight_decay: Any = 0.01,
    xp: Any,
) -> tuple[Any, Any, Any]:
    """One step of AdamW: `p - lr (u + weight_decay p)` with `u` Adam's direction.

    Args:
        p: the parameter; float32.
        g: its gradient, settled.
        m: the first moment.
        v: the second.
        factors: from `adam_factors`.
        lr: the learning rate.
        b1: decay of the first moment.
        b2: decay of the second.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        xp: the array namespace.

    Returns:
        The new `p`, `m` and `v`.
    """
    m, v, u = adam_direction(g, m, v, factors, b1=b1, b2=b2, eps=eps, xp=xp)
    return step(p, u, lr=lr, weight_decay=weight_decay, xp=xp), m, v


def adam_direction(
    g: Any,
    m: Any,
    v: Any,
    factors: tuple[Any, Any],
    *,
    b1: Any,
    b2: Any,
    eps: float,
    nesterov: bool = False,
    xp: Any,
) -> tuple[Any, Any, Any]:
    """The new moments and Adam's direction. Arguments as of `adamw`.

    With `nesterov` the numerator is `b1 m + (1 - b1) g` of the new `m`.
    """
    share = mul(g, rest(b1, xp=xp), xp=xp)
    m = add(mul(m, rounded(b1), xp=xp), share, xp=xp)
    ahead = add(mul(m, rounded(b1), xp=xp), share, xp=xp) if nesterov else m
    square = mul(mul(g, g, xp=xp), rest(b2, xp=xp), xp=xp)
    v = add(mul(v, rounded(b2), xp=xp), square, xp=xp)
    root = mul(sqrt(v, xp=xp), factors[1], xp=xp) + f32(eps)
    return m, v, div(mul(ahead, factors[0], xp=xp), root, xp=xp)


def change(p: Any, u: Any, *, lr: Any, weight_decay: Any, xp: Any) -> Any:
    """`lr (u + weight_decay p)`, which a step takes off `p`."""
    u = add(u, mul(p, rounded(weight_decay), xp=xp), xp=xp)
    return mul(u, rounded(lr), xp=xp)


def step(p: Any, u: Any, *, lr: Any, weight_decay: Any, xp: Any) -> Any:
    """`p - lr (u + weight_decay p)`."""
    return sub(p, change(p, u, lr=lr, weight_decay=weight_decay, xp=xp), xp=xp)


def lion(
    p: Any,
    g: Any,
    m: Any,
    *,
    lr: Any,
    b1: Any = 0.9,
    b2: Any = 0.99,
    weight_decay: Any = 0.0,
    xp: Any,
) -> tuple[Any, Any]:
    """One step of Lion: the new `p` and `m`. Arguments as of `adamw`."""
    m, u = lion_direction(g, m, b1=b1, b2=b2, xp=xp)
    return step(p, u, lr=lr, weight_decay=weight_decay, xp=xp), m


def lion_direction(g: Any, m: Any, *, b1: Any, b2: Any, xp: Any) -> tuple[Any, Any]:
    """The new moment and Lion's direction. Arguments as of `adamw`."""
    u = sign(add(mul(m, rounded(b1), xp=xp), mul(g, rest(b1, xp=xp), xp=xp), xp=xp), xp=xp)
    return add(mul(m, rounded(b2), xp=xp), mul(g, rest(b2, xp=xp), xp=xp), xp=xp), u


def sign(x: Any, *, xp: Any) -> Any:
    """1, 0 or -1 in float32; NaN stays."""
    one = xp.ones_like(x)
    return xp.where(x > 0.0, one, xp.where(x < 0.0, -one, x))


def sgd(
    p: Any,
    g: Any,
    m: Any = None,
    *,
    lr: Any,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: Any = 0.0,
    xp: Any,
) -> tuple[Any, Any]:
    """One step of SGD: the new `p` and `m`.

    Args:
        p: the parameter; float32.
        g: its gradient, settled.
        m: the momentum, zeros at the start; `None` where there is none.
        lr: the learning rate.
        momentum: its decay.
        nesterov: looks one step of the momentum ahead.
        weight_decay: times the parameter is added to the gradient.
        xp: the array namespace.
    """
    options = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    m, u = sgd_direction(p, g, m, **options, xp=xp)
    return sub(p, mul(u, rounded(lr), xp=xp), xp=xp), m


def sgd_direction(
    p: Any, g: Any, m: Any, *, momentum: float, nesterov: bool, weight_decay: Any, xp: Any
) -> tuple[Any, Any]:
    """The new momentum and the direction of SGD. Arguments as of `sgd`."""
    g = add(g, mul(p, rounded(weight_decay), xp=xp), xp=xp)
    if m is None:
        return None, g
    m = add(mul(m, f32(momentum), xp=xp), g, xp=xp)
    return m, add(g, mul(m, f32(momentum), xp=xp), xp=xp) if nesterov else m


def global_norm(leaves: Sequence[Any], *, xp: Any) -> Any:
    """The Euclidean norm of all arrays together; squares neither over- nor underflow.

    Args:
        leaves: float32 arrays, settled; at least one.
        xp: the array namespace.

    Returns:
        float32, `()`. NaN where anything is not finite.
    """
    flat, e = _scaled(leaves, xp)
    squares = [total(mul(x, x, xp=xp), 0, keepdims=True, xp=xp) for x in flat]
    square = total(join(squares, 0, xp=xp), 0, keepdims=True, xp=xp)
    root = opaque(xp.sqrt(up(square, xp=xp)), xp=xp)
    return down(root * up(power(e - 127, xp=xp), xp=xp), xp=xp)[0]


def _scaled(leaves: Sequence[Any], xp: Any) -> tuple[list[Any], Any]:
    """Arrays as vectors times the power of two that makes their largest 1 to 2, and its field."""
    flat = [leaf.reshape(-1) for leaf in leaves]
    peaks = join([largest(xp.abs(x), 0, xp=xp) for x in flat], 0, xp=xp)
    e = field(largest(peaks, 0, xp=xp), xp=xp)
    e = xp.where(e > 253, xp.full_like(e, 253), e)
    return [x * power(127 - e, xp=xp) for x in flat], e


def norms_and_product(a: Sequence[Any], b: Sequence[Any], *, xp: Any) -> tuple[Any, Any, Any]:
    """What a cosine is made of: `sum a b`, the root of `sum a^2`, and `sum b^2`.

    Each side is multiplied by a power of two of its own first, so that nothing over- or underflows;
    a cosine does not see it.

    Args:
        a: float32 arrays, settled; at least one.
        b: of the same shapes.
        xp: the array namespace.

    Returns:
        Three float32 `()`. NaN where anything that they are made of is not finite.
    """
    (a, _), (b, _) = _scaled(a, xp), _scaled(b, xp)

    def product(x: Any, y: Any) -> Any:
        pairs = zip(x, y, strict=True)
        parts = [total(mul(s, t, xp=xp), 0, keepdims=True, xp=xp) for s, t in pairs]
        return total(join(parts, 0, xp=xp), xp=xp)

    return product(a, b), sqrt(product(a, a), xp=xp), product(b, b)


def gamma_norm(leaves: Sequence[Any], gamma: float, *, xp: Any) -> Any:
    """`(sum |g|^gamma)^(1/gamma)` of all arrays together, as control laws sense it.

    Args:
        leaves: float32 arrays, settled; at least one.
        gamma: the exponent, above 0; for 1.5 there is `|g| sqrt|g|`, else `exp(gamma log|g|)`.
        xp: the array namespace.

    Returns:
        float32, `()`. NaN where anything is not finite.
    """
    flat, e = _scaled(leaves, xp)
    sums = [total(_power(xp.abs(x), gamma, xp), 0, keepdims=True, xp=xp) for x in flat]
    norm = _power(total(join(sums, 0, xp=xp), 0, keepdims=True, xp=xp), 1 / gamma, xp)
    return down(up(norm, xp=xp) * up(power(e - 127, xp=xp), xp=xp), xp=xp)[0]


def _power(a: Any, exponent: float, xp: Any) -> Any:
    """`a^exponent` for `a >= 0`; NaN and infinity become NaN."""
    if exponent == 1.5:
        return mul(a, sqrt(settle(a, xp=xp), xp=xp), xp=xp)
    some = (a > TINY) & (a < math.inf)
    out = exp(mul(log(xp.where(some, a, xp.ones_like(a)), xp=xp), f32(exponent), xp=xp), xp=xp)
    return xp.where(some, out, xp.where(a <= TINY, xp.zeros_like(a), xp.full_like(a, math.nan)))


def clip_factor(norm: Any, limit: float, *, xp: Any) -> Any:
    """What gradients are multiplied by so that their `norm` is at most `limit`; NaN where it is."""
    one = xp.ones_like(norm)
    return xp.where(norm <= limit, one, div(one * f32(limit), norm, xp=xp))


def warmup_cosine(
    count: Any, *, peak: float, warmup: int, steps: int, end: float = 0.0, xp: Any
) -> Any:
    """A rate that rises in a line and falls along half a cosine.

    Args:
        count: the number of the step, from 0; an int32 array below `2^24`.
        peak: the highest rate.
        warmup: steps of the rise, from 0.
        steps: in all, at which the rate is `end` and stays.
        end: the last rate.
        xp: the array namespace.

    Returns:
        float32 of the shape of `count`.

    Raises:
        ValueError: where `steps` is not above `warmup`.
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"steps must be above warmup >= 0, got {steps} and {warmup}; raise steps.")
    t = cast(count, xp.float32)
    ones = xp.ones_like(t)
    done = div(xp.where(t > warmup, t - float(warmup), 0.0 * ones), ones * (steps - warmup), xp=xp)
    done = xp.where(done > 1.0, ones, done)
    height = mul(1.0 + cos_pi(done, xp=xp), 0.5, xp=xp)
    fall = add(mul(height, f32(peak - end), xp=xp), f32(end), xp=xp)
    rise = mul(div(t, ones * max(warmup, 1), xp=xp), f32(peak), xp=xp)
    return settle(xp.where(t < warmup, rise, fall), xp=xp)


def warmup_stable_decay(
    count: Any, *, peak: float, warmup: int, decay: int, steps: int, end: float = 0.0, xp: Any
) -> Any:
    """A rate that rises in a line, stays, and falls in a line over the last `decay` steps.

    Arguments as of `warmup_cosine`.

    Raises:
        ValueError: where `warmup` and `decay` do not fit into `steps`.
    """
    if warmup < 0 or decay < 1 or warmup + decay > steps:
        raise ValueError(
            f"warmup >= 0 and decay >= 1 must fit into steps, got {warmup}, {decay} and {steps}; "
            "shorten them."
        )
    t = cast(count, xp.float32)
    ones = xp.ones_like(t)
    left = xp.where(t < steps, float(steps) - t, 0.0 * ones)
    left = xp.where(left > decay, ones, div(left, ones * decay, xp=xp))
    fall = add(mul(left, f32(peak - end), xp=xp), f32(end), xp=xp)
    rise = mul(div(t, ones * max(warmup, 1), xp=xp), f32(peak), xp=xp)
    return settle(xp.where(t < warmup, rise, fall), xp=xp)
