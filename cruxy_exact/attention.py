"""Attention and what it is made of: softmax, heads, rotary positions. Pairs as in `layers`."""

import math
from decimal import Decimal, localcontext
from typing import Any

from cruxy_exact._namespace import count_up, join, largest, replaceable, transposed
from cruxy_exact.arithmetic import add, exp, f32, mul, reciprocal, settle, sub
from cruxy_exact.engines import DEFAULT, Precision
from cruxy_exact.layers import Kept
from cruxy_exact.sums import matmul, total

MASKED = -1e30
"""What stands for a score that is masked out."""


@replaceable
def softmax_forward(z: Any, *, xp: Any) -> tuple[Any, Kept]:
    """The softmax over the last axis."""
    e = exp(sub(z, largest(z, -1, xp=xp), xp=xp), xp=xp)
    p = mul(e, reciprocal(total(e, -1, keepdims=True, xp=xp), xp=xp), xp=xp)
    return p, (p,)


@replaceable
def softmax_backward(kept: Kept, g: Any, *, xp: Any) -> Kept:
    """The gradient of `z`: `p (g - sum(g p))`."""
    (p,) = kept
    g = settle(g, xp=xp)
    along = total(mul(g, p, xp=xp), -1, keepdims=True, xp=xp)
    return (mul(p, sub(g, along, xp=xp), xp=xp),)


def to_heads(x: Any, heads: int, *, xp: Any) -> Any:
    """`[B, T, D]` as `[B, heads, T, D / heads]`."""
    b, t, d = x.shape
    return xp.swapaxes(x.reshape(b, t, heads, d // heads), 1, 2)


def from_heads(x: Any, *, xp: Any) -> Any:
    """What `to_heads` was given."""
    b, heads, t, d = x.shape
    return xp.swapaxes(x, 1, 2).reshape(b, t, heads * d)


def attention_forward(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    *,
    causal: bool = False,
    precision: Precision = DEFAULT,
    xp: Any,
) -> tuple[Any, Kept]:
    """Scaled dot-product attention; queries may share keys and values in groups.

    Args:
        q: float32, `[B, H, T, d]`.
        k: float32, `[B, G, S, d]`, where `G` divides `H`: `H / G` queries in a row share one.
        v: float32, `[B, G, S, e]`.
        mask: booleans that broadcast against `[B, H, T, S]`: what is true is attended to. A row
            needs at least one.
        causal: masks keys after their query out. The last query sees all keys.
        precision: of the products.
        xp: the array namespace.

    Returns:
        float32, `[B, H, T, e]`, and what the backward pass needs.

    Raises:
        ValueError: where the heads of `k` and `v` differ or do not divide those of `q`.
    """
    (b, h, t, d), (_, groups, s, _) = q.shape, k.shape
    if v.shape[1] != groups or h % groups:
        raise ValueError(
            f"heads of k and v must be equal and divide those of q, got {h}, {groups} and "
            f"{v.shape[1]}; repeat or drop heads."
        )
    rows = q.reshape(b, groups, h // groups * t, d)
    scale = f32(1 / math.sqrt(d))
    z = mul(matmul(rows, transposed(k, xp=xp), precision=precision, xp=xp), scale, xp=xp)
    z = z.reshape(b, h, t, s)
    if causal:
        seen = count_up(t, q, xp=xp)[:, None] + (s - t) >= count_up(s, q, xp=xp)[None, :]
        z = xp.where(seen, z, xp.full_like(z, MASKED))
    if mask is not None:
        z = xp.where(mask, z, xp.full_like(z, MASKED))
    p, _ = softmax_forward(z, xp=xp)
    p = p.reshape(b, groups, h // groups * t, s)
    out = matmul(p, v, precision=precision, xp=xp)
    return out.reshape(b, h, t, v.shape[-1]), (rows, k, v, p, h, precision)


def attention_backward(kept: Kept, g: Any, *, xp: Any) -> Kept:
    """The gradients of `q`, `k` and `v`; a key's and a value's over all queries that share it."""
    rows, k, v, p, h, precision = kept
    b, groups, n, d = rows.shape
    g = settle(g, xp=xp).reshape(b, groups, n, v.shape[-1])
    dv = matmul(transposed(p, xp=xp), g, precision=precision, xp=xp)
    dp = matmul(g, transposed(v, xp=xp), precision=precision, xp=xp)
    dz = mul(softmax_backward((p,), dp, xp=xp)[0], f32(1 / math.sqrt(d)), xp=xp)
    dq = matmul(dz, k, precision=precision, xp=xp).reshape(b, h, n * groups // h, d)
    return dq, matmul(transposed(dz, xp=xp), rows, precision=precision, xp=xp), dv


def fused_attention_forward(
    qkv: Any, heads: int, *, causal: bool = True, precision: Precision = DEFAULT, xp: Any
) -> tuple[Any, Kept]:
    """Attention on queries, keys and values side by side: `[B, T, 3 D]` to `[B, T, D]`."""
    d = qkv.shape[-1] // 3
    q, k, v = (to_heads(qkv[..., i * d : (i + 1) * d], heads, xp=xp) for i in range(3))
    out, kept = attention_forward(q, k, v, causal=causal, precision=precision, xp=xp)
    return from_heads(out, xp=xp), (*kept,)


def fused_attention_backward(kept: Kept, g: Any, *, xp: Any) -> Kept:
    """The gradient of `qkv`."""
    g = to_heads(g, kept[4], xp=xp)
    parts = attention_backward(kept, g, xp=xp)
    return (join([from_heads(part, xp=xp) for part in parts], -1, xp=xp),)


def rotary_table(length: int, width: int, base: float = 10000.0) -> tuple[list, list]:
    """Cosines and sines of rotary positions, computed by the host in whole steps that are the same.

    Args:
        length: of the sequence.
        width: of a head, an even number.
        base: angles are `position * base^(-2 i / width)`.

    Returns:
        Two lists of `length` lists of `width / 2` float32 values.

    Raises:
        ValueError: where `width` is odd.
    """
    if width % 2:
        raise ValueError(f"width must be even, got {width}; rotary positions turn pairs.")
    with localcontext() as context:
        context.prec = 40
        log_base = Decimal(base).ln()
        rates = [float((log_base * (-2 * i) / width).exp()) for i in range(width // 2)]
    table = [[_cos_sin(position * rate) for rate in rates] for position in range(length)]
    cosines = [[f32(c) for c, _ in row] for row in table]
    return cosines, [[f32(s) for _, s in row] for row in table]


_QUARTER = (1.5707963109016418, 1.5893254712295857e-08)
"""Half of pi in two parts; the first has 25 bits, so that small multiples of it are exact."""


def _cos_sin(x: float) -> tuple[float, float]:
    """Both by additions and products of Python numbers, which no compiler rearranges."""
    n = round(x * 0.6366197723675814)
    r = (x - n * _QUARTER[0]) - n * _QUARTER[1]
    z = r * r
    sine, cosine = 1.0, 1.0
    for k in range(17, 2, -2):
        sine = 1.0 - sine * z / (k * (k - 1))
        cosine = 1.0 - cosine * z / ((k - 1) * (k - 2))
    sine *= r
    return ((cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine))[n % 4]


def rotary_forward(x: Any, cosine: Any, sine: Any, *, xp: Any) -> tuple[Any, Kept]:
    """Turns the pairs `(x_i, x_(i + d/2))` by the angle of their position.

    Args:
        x: float32, `[..., T, d]`.
        cosine: from `rotary_table` as float32, `[T, d / 2]`.
        sine: likewise.
        xp: the array namespace.
    """
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    one = sub(mul(a, cosine, xp=xp), mul(b, sine, xp=xp), xp=xp)
    two = add(mul(b, cosine, xp=xp), mul(a, sine, xp=xp), xp=xp)
    return join([one, two], -1, xp=xp), (cosine, sine)


def rotary_backward(kept: Kept, g: Any, *, xp: Any) -> Kept:
    """The gradient of `x`: turned back."""
    cosine, sine = kept
    return (rotary_forward(settle(g, xp=xp), cosine, -sine, xp=xp)[0],)
