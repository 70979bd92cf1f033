"""Exact attention and what it is made of, as differentiable functions."""

from typing import Any

import jax
import jax.numpy as jnp

from cruxy_exact import attention as core
from cruxy_exact.engines import DEFAULT, Precision
from cruxy_optax.exact._frame import tested
from cruxy_optax.exact._pairs import run


def softmax(x: Any) -> jax.Array:
    """The softmax over the last axis; float32."""
    return run(core, "softmax", (x,))


def attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    *,
    causal: bool = False,
    precision: Precision = DEFAULT,
) -> jax.Array:
    """Scaled dot-product attention; fewer heads of `k` and `v` serve queries in groups.

    Args:
        q: float32, `[B, H, T, d]`.
        k: float32, `[B, G, S, d]`, where `G` divides `H`: `H / G` queries in a row share one.
        v: float32, `[B, G, S, e]`.
        mask: booleans that broadcast against `[B, H, T, S]`, true where a query attends; at least
            one a row.
        causal: masks keys after their query out. The last query sees all keys.
        precision: see `matmul`.

    Returns:
        float32, `[B, H, T, e]`.

    Raises:
        ValueError: where the heads do not fit.
        TypeError: where `q`, `k` or `v` is not float32, or the mask is not boolean.
    """
    if mask is not None and jnp.asarray(mask).dtype != jnp.bool_:
        raise TypeError(f"mask must be boolean, got {jnp.asarray(mask).dtype}; use mask > -1.")
    options = {"causal": causal, "precision": tested(precision)}
    return run(core, "attention", (q, k, v), (mask,), **options)


def fused_attention(
    qkv: Any, heads: int, *, causal: bool = True, precision: Precision = DEFAULT
) -> jax.Array:
    """Attention on queries, keys and values side by side.

    Args:
        qkv: float32, `[B, T, 3 D]`.
        heads: how many; divides `D`.
        causal: masks keys after their query out.
        precision: see `matmul`.

    Returns:
        float32, `[B, T, D]`.

    Raises:
        ValueError: where the heads do not divide.
        TypeError: where `qkv` is not float32.
    """
    if jnp.shape(qkv)[-1] % (3 * heads):
        raise ValueError(
            f"the last axis must be 3 * heads * d, got {jnp.shape(qkv)[-1]} with {heads} heads."
        )
    options = {"causal": causal, "precision": tested(precision)}
    return run(core, "fused_attention", (qkv,), fixed=(heads,), **options)


def rotary_table(length: int, width: int, base: float = 10000.0) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of rotary positions.

    Args:
        length: of the sequence.
        width: of a head, an even number.
        base: angles are `position * base^(-2 i / width)`.

    Returns:
        Two float32 arrays, `[length, width / 2]`.

    Raises:
        ValueError: where `width` is odd.
    """
    cosine, sine = core.rotary_table(length, width, base)
    shape = (length, width // 2)
    return (
        jnp.asarray(cosine, jnp.float32).reshape(shape),
        jnp.asarray(sine, jnp.float32).reshape(shape),
    )


def rotary(x: Any, cosine: Any, sine: Any) -> jax.Array:
    """Rotary positions: turns the pairs `(x_i, x_(i + d/2))` by the angle of their position.

    Args:
        x: float32, `[..., T, d]`.
        cosine: from `rotary_table`, `[T, d / 2]`.
        sine: likewise.

    Raises:
        TypeError: where `x` is not float32.
    """
    return run(core, "rotary", (x,), (cosine, sine))
