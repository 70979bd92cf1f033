"""Layers, forward and backward, with the same bits everywhere.

Each layer is a pair. `NAME_forward(arrays, options, xp=)` returns the output and what the backward
pass needs; `NAME_backward(kept, g, xp=)` returns the gradients of the arrays, in their order. What
is kept is a tuple of arrays, and of `Precision`, numbers, shapes and booleans, which a compiler has
to treat as static.
Every backward pass settles `g` first: that covers the additions a framework makes on its way. An
array used three times or more has to pass through `fork`, as sums of three depend on their order.

All arrays are float32 but for whole numbers such as labels. In JAX the functions need 64-bit types:
call them inside `jax.enable_x64(True)`.
"""

import math
from typing import Any

from cruxy_exact._namespace import cast, count_up, largest, pick, replaceable, transposed
from cruxy_exact.arithmetic import (
    add,
    erf,
    exp,
    f32,
    log,
    mul,
    reciprocal,
    settle,
    sigmoid,
    sqrt,
    sub,
)
from cruxy_exact.engines import DEFAULT, Precision
from cruxy_exact.random_bits import random_bits
from cruxy_exact.sums import combine, matmul, mean, scatter_add, total

Kept = tuple[Any, ...]


def linear_forward(
    x: Any, w: Any, b: Any = None, *, precision: Precision = DEFAULT, xp: Any
) -> tuple[Any, Kept]:
    """`x w + b`: `x` is `[..., K]`, `w` `[K, N]`, `b` `[N]` or `None`."""
    rows = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
    y = matmul(rows, w, precision=precision, xp=xp)
    if b is not None:
        y = add(y, b, xp=xp)
    return y.reshape(*x.shape[:-1], w.shape[1]), (rows, w, b is not None, precision)


def linear_backward(kept: Kept, g: Any, *, xp: Any) -> Kept:
    """The gradients of `x` and `w`, and of `b` where there is one."""
    rows, w, has_bias, precision = kept
    shape, g = g.shape, settle(g, xp=xp).reshape(-1, g.shape[-1])
    dx = matmul(g, transposed(w, xp=xp), precision=precision, xp=xp)
    dw = matmul(transposed(rows, xp=xp), g, precision=precision, xp=xp)
    grads = (dx.reshape(*shape[:-1], w.shape[0]), dw)
    return (*grads, total(g, 0, xp=xp)) if has_bias else grads


def matmul_forward(a: Any, b: Any, *, precision: Precision = DEFAULT, xp: Any) -> tuple[Any, Kept]:
    """`sums.matmul` of arrays with the same leading axes."""
    return matmul(a, b, precision=precision, xp=xp), (a, b, precision)


def matmul_backward(kept: Kept, g: Any, *, xp: Any) -> Kept:
    """The gradients of both factors."""
    a, b, precision = kept
    g = settle(g, xp=xp)
    da = matmul(g, transposed(b, xp=xp), precision=precision, xp=xp)
    return da, matmul(transposed(a, xp=xp), g, precision=precision, xp=xp)


@replaceable
def layer_norm_forward(x: Any, w: Any, b: Any, *, eps: float = 1e-5, xp: Any) -> tuple[Any, Kept]:
    """Layer normalization over the last axis; `w` and `b` are `[D]`."""
    c = sub(x, mean(x, -1, keepdims=True, xp=xp), xp=xp)
    variance = mean(mul(c, c, xp=xp), -1, keepdims=True, xp=xp)
    r = reciprocal(sqrt(variance + f32(eps), xp=xp), xp=xp)
    h = mul(c, r, xp=xp)
    return add(mul(h, w, xp=xp), b, xp=xp), (h, r, w)


@replaceable
def layer_norm_backward(kept: Kept, g: Any, *, xp: Any) -> Kept:
    """The gradients of `x`, `w` and `b`."""
    h, r, w = kept
    g = settle(g, xp=xp)
    d = mul(g, w, xp=xp)
    centred = sub(d, mean(d, -1, keepdims=True, xp=xp), xp=xp)
    along = mul(h, mean(mul(d, h, xp=xp), -1, keepdims=True, xp=xp), xp=xp)
    rows = tuple(range(g.ndim - 1))
    dw, db = total(mul(g, h, xp=xp), rows, xp=xp), total(g, rows, xp=xp)
    return mul(sub(centred, along, xp=xp), r, xp=xp), dw, db


@replaceable
def rms_norm_forward(x: Any, w: Any, *, eps: float = 1e-6, xp: Any) -> tuple[Any, Kept]:
    """Normalization by the root mean square over the last axis; `w` is `[D]`."""
    square = mean(mul(x, x, xp=xp), -1, keepdims=True, xp=xp)
    r = reciprocal(sqrt(square + f32(eps), xp=xp), xp=xp)
    h = mul(x, r, xp=xp)
    return mul(h, w, xp=xp), (h, r, w)


@replaceable
def rms_norm_backward(kept: Kept, g: Any, *, xp: Any) -> Kept:
    """The gradients of `x` and `w`."""
    h, r, w = kept
    g = settle(g, xp=xp)
    d = mul(g, w, xp=xp)
    along = mul(h, mean(mul(d, h, xp=xp), -1, keepdims=True, xp=xp), xp=xp)
    dw = total(mul(g, h, xp=xp), tuple(range(g.ndim - 1)), xp=xp)
    return mul(sub(d, along, xp=xp), r, xp=xp), dw


GELU_0 = f32(2 * math.sqrt(2 / math.pi))
GELU_1 = f32(2 * 0.044715 * math.sqrt(2 / math.pi))
GELU_3 = f32(6 * 0.044715 * math.sqrt(2 / math.pi))
"""Of `u = x (GELU_0 + GELU_1 x^2)`, whose derivative is `GELU_0 + GELU_3 x^2`."""


@replaceable
def gelu_forward(x: Any, *, xp: Any) -> tuple[Any, Kept]:
    """Gelu in its tanh form, which is `x sigmoid(u)`."""
    square = mul(x, x, xp=xp)
    s = sigmoid(mul(x, mul(square, GELU_1, xp=xp) + GELU_0, xp=xp), xp=xp)
    return mul(x, s, xp=xp), (x, square, s)


@replaceable
def gelu_backward(kept: Kept, g: Any, *, xp: Any) -> Kept:
    """The gradient of `x`: `s + x s (1 - s) u'` times `g`."""
    x, square, s = kept
    slope = mul(x, mul(s, 1.0 - s, xp=xp), xp=xp)
    slope = mul(slope, mul(square, GELU_3, xp=xp) + GELU_0, xp=xp)
    return (mul(settle(g, xp=xp), add(s, slope, xp=xp), xp=xp),)


_SQRT_HALF = f32(math.sqrt(0.5))
_DENSITY = f32(1 / math.sqrt(2 * math.pi))


def gelu_exact_forward(x: Any, *, xp: Any) -> tuple[Any, Kept]:
    """Gelu by the error function: `x Phi(x)`."""
    phi = mul(1.0 + erf(mul(x, _SQRT_HALF, xp=xp), xp=xp), 0.5, xp=xp)
    return mul(x, phi, xp=xp), (x, phi)


def gelu_exact_backward(kept: Kept, g: Any, *, xp: Any) -> Kept:
    """The gradient of `x`: `Phi(x) + x phi(x)` times `g`."""
    x, phi = kept
    density = mul(exp(mul(mul(x, x, xp=xp), -0.5, xp=xp), xp=xp), _DENSITY, xp=xp)
    return (mul(settle(g, xp=xp), add(phi, mul(x, density, xp=xp), xp=xp), xp=xp),)


def silu_forward(x: Any, *, xp: Any) -> tuple[Any, Kept]:
    """`x sigmoid(x)`."""
    s = sigmoid(x, xp=xp)
    return mul(x, s, xp=xp), (x, s)


def silu_backward(kept: Kept, g: Any, *, xp: Any) -> Kept:
    """The gradient of `x`: `s + x s (1 - s)` times `g`."""
    x, s = kept
    slope = add(s, mul(x, mul(s, 1.0 - s, xp=xp), xp=xp), xp=xp)
    return (mul(settle(g, xp=xp), slope, xp=xp),)


def relu_forward(x: Any, *, xp: Any) -> tuple[Any, Kept]:
    """`x` where it is positive, else 0; NaN stays."""
    return xp.where(x <= 0.0, xp.zeros_like(x), settle(x, xp=xp)), (x > 0.0,)


def relu_backward(kept: Kept, g: Any, *, xp: Any) -> Kept:
    """`g` where `x` was positive, else 0."""
    g = settle(g, xp=xp)
    return (xp.where(kept[0], g, xp.zeros_like(g)),)


def add_forward(a: Any, b: Any, *, xp: Any) -> tuple[Any, Kept]:
    """The sum of two arrays of one shape, as of a residual."""
    return add(a, b, xp=xp), ()


def add_backward(kept: Kept, g: Any, *, xp: Any) -> Kept:
    """The gradient of both."""
    g = settle(g, xp=xp)
    return g, g


def mul_forward(a: Any, b: Any, *, xp: Any) -> tuple[Any, Kept]:
    """The product of two arrays of one shape, as of a gate."""
    return mul(a, b, xp=xp), (a, b)


def mul_backward(kept: Kept, g: Any, *, xp: Any) -> Kept:
    """The gradients of both."""
    a, b = kept
    g = settle(g, xp=xp)
    return mul(g, b, xp=xp), mul(g, a, xp=xp)


def scale_forward(x: Any, factor: float, *, xp: Any) -> tuple[Any, Kept]:
    """`x` times a number, which is rounded to float32."""
    return mul(x, f32(factor), xp=xp), (f32(factor),)


def scale_backward(kept: Kept, g: Any, *, xp: Any) -> Kept:
    """`g` times the number."""
    return (mul(settle(g, xp=xp), kept[0], xp=xp),)


def fork_forward(x: Any, n: int, *, xp: Any) -> tuple[tuple[Any, ...], Kept]:
    """The same array `n` times, for an array that is used three times or more.

    The gradients of the copies, all `n` of them, are added exactly.
    """
    return (x,) * n, ()


def fork_backward(kept: Kept, gs: Any, *, xp: Any) -> Kept:
    """The exact sum of the copies' gradients, a tuple."""
    return (combine([settle(g, xp=xp) for g in gs], xp=xp),)


def embed_forward(w: Any, ids: Any, *, xp: Any) -> tuple[Any, Kept]:
    """Rows of `w`, `[V, D]`, by whole numbers from 0 to `V - 1`."""
    return w[ids], (ids, w.shape[0])


def embed_backward(kept: Kept, g: Any, *, xp: Any) -> Kept:
    """The gradient of `w`: rows added up exactly."""
    ids, rows = kept
    g = settle(g, xp=xp).reshape(-1, g.shape[-1])
    return (scatter_add(ids.reshape(-1), g, rows, xp=xp),)


@replaceable
def dropout_forward(x: Any, key: Any, keep: int, *, xp: Any) -> tuple[Any, Kept]:
    """Keeps each element with the probability `keep / 256` and scales it by the reciprocal.

    Args:
        x: float32, any shape.
        key: from `random_bits.stream_key`; an element's number in the whole of `x` is its index.
        keep: a whole number from 1 to 256.
        xp: the array namespace.

    Raises:
        ValueError: where `keep` is none of these.
    """
    if not 1 <= keep <= 256:
        raise ValueError(f"keep must be from 1 to 256 (256ths), got {keep!r}; use round(256 * p).")
    index = count_up(math.prod(x.shape), x, xp=xp).reshape(x.shape)
    kept = ((random_bits(key, index) >> 24) & 255) < keep
    factor = f32(256 / keep)
    return xp.where(kept, mul(x, factor, xp=xp), xp.zeros_like(x)), (kept, factor)


def dropout_backward(kept: Kept, g: Any, *, xp: Any) -> Kept:
    """The gradient of `x`."""
    mask, factor = kept
    g = settle(g, xp=xp)
    return (xp.where(mask, mul(g, factor, xp=xp), xp.zeros_like(g)),)


def sum_forward(x: Any, *, xp: Any) -> tuple[Any, Kept]:
    """The sum of all elements, `()`."""
    return total(x, xp=xp), (tuple(x.shape),)


def sum_backward(kept: Kept, g: Any, *, xp: Any) -> Kept:
    """`g` for every element."""
    g = settle(g, xp=xp)
    return (xp.broadcast_to(g, kept[0]),)


@replaceable
def cross_entropy_forward(logits: Any, labels: Any, *, xp: Any) -> tuple[Any, Kept]:
    """Minus the logarithm of the softmax at the label, one number a row; never a mean.

    Divide the sum by its count after gradients have been accumulated, not before.

    Args:
        logits: float32, `[..., V]`.
        labels: whole numbers from 0 to `V - 1`; `[...]`.
        xp: the array namespace.
    """
    c = sub(logits, largest(logits, -1, xp=xp), xp=xp)
    e = exp(c, xp=xp)
    t = total(e, -1, keepdims=True, xp=xp)
    loss = sub(log(t[..., 0], xp=xp), pick(c, labels, xp=xp), xp=xp)
    return loss, (mul(e, reciprocal(t, xp=xp), xp=xp), labels)


@replaceable
def cross_entropy_backward(kept: Kept, g: Any, *, xp: Any) -> Kept:
    """The gradient of the logits: the softmax, less 1 at the label, times `g`."""
    p, labels = kept
    g = settle(g, xp=xp)[..., None]
    hit = count_up(p.shape[-1], p, xp=xp) == cast(labels, xp.int32)[..., None]
    return (mul(xp.where(hit, p - 1.0, p), g, xp=xp),)
