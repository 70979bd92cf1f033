"""The reference model built of exact functions, and without exact arithmetic for its cost."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cruxy_exact.reference import Reference
from cruxy_optax.exact import _attention as attention
from cruxy_optax.exact import _functional as functional


def reference_loss(
    reference: Reference, params: Mapping[str, Any], x: Any, y: Any, step: Any, grain: Any = 0
) -> jax.Array:
    """The loss of the reference GPT, whose gradients are those that the reference trains with.

    Args:
        reference: `cruxy_exact.Reference`: sizes, seed and precision.
        params: its parameters by name, as `Reference.init` makes them.
        x: tokens, `[n, length]`.
        y: the tokens that follow.
        step: its number, for dropout; an int or an int32 array `()`.
        grain: the number of the grain in the whole batch, where gradients are accumulated.

    Returns:
        The sum of the cross entropy; float32, `()`.
    """
    linear = functools.partial(functional.linear, precision=reference.precision)

    def at(name: str, h: Any, layer: Callable[..., Any] = linear) -> Any:
        return layer(h, params[f"{name}.w"], params[f"{name}.b"])

    def residual(name: str, h: Any, branch: Any, layer: int) -> Any:
        key = functional.dropout_key(step, 1000 + layer, seed=reference.seed, grain=grain)
        branch = functional.dropout(at(name, branch), key, 1 - reference.keep / 256)
        return functional.add(h, branch)

    places = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape)
    h = functional.add(functional.embed(params["tok"], x), functional.embed(params["pos"], places))
    for i in range(reference.blocks):
        qkv = at(f"{i}.qkv", at(f"{i}.ln1", h, functional.layer_norm))
        a = attention.fused_attention(qkv, reference.heads, precision=reference.precision)
        h = residual(f"{i}.o", h, a, 2 * i)
        a = functional.gelu(at(f"{i}.up", at(f"{i}.ln2", h, functional.layer_norm)))
        h = residual(f"{i}.dn", h, a, 2 * i + 1)
    logits = at("head", at("ln", h, functional.layer_norm))
    return functional.sum(functional.softmax_cross_entropy_with_integer_labels(logits, y))


def plain_step(reference: Reference, like: Any) -> Callable[[int], None]:
    """A step of plain training of the model that `reference` trains exactly.

    Args:
        reference: the model and its sizes; its precision, grains and seed do not matter.
        like: an array on the device.

    Returns:
        A function of the number of the step that trains and waits.
    """
    (device,) = like.devices()
    tx = optax.chain(optax.clip_by_global_norm(reference.clip), optax.adamw(reference.lr))
    with jax.enable_x64(True):
        start = reference.init(like, xp=jnp)
    params = jax.device_put(start, device)
    state = tx.init(params)
    key = jax.device_put(jax.random.key(reference.seed), device)

    @jax.jit
    def step(params: Any, state: Any, x: Any, y: Any, key: Any) -> Any:
        grads = jax.grad(lambda p: _loss(reference, p, x, y, key))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def run(count: int) -> None:
        nonlocal params, state
        shape = (reference.batch, reference.length + 1)
        ids = np.random.default_rng(count).integers(0, reference.vocabulary, shape, np.int32)
        x, y = (jax.device_put(part, device) for part in (ids[:, :-1], ids[:, 1:]))
        params, state = step(params, state, x, y, jax.random.fold_in(key, count))
        jax.block_until_ready(params)

    return run


def _loss(r: Reference, p: Any, x: Any, y: Any, key: Any) -> Any:
    """The mean cross entropy of the GPT."""
    h = p["tok"][x] + p["pos"]
    keys = iter(jax.random.split(key, 2 * r.blocks))

    def dropout(h: Any) -> Any:
        kept = jax.random.bernoulli(next(keys), r.keep / 256, h.shape)
        return jnp.where(kept, h * (256 / r.keep), 0.0)

    def linear(name: str, h: Any) -> Any:
        return h @ p[f"{name}.w"] + p[f"{name}.b"]

    def norm(name: str, h: Any) -> Any:
        return jax.nn.standardize(h, epsilon=1e-5) * p[f"{name}.w"] + p[f"{name}.b"]

    for i in range(r.blocks):
        qkv = linear(f"{i}.qkv", norm(f"{i}.ln1", h))
        q, k, v = (a.reshape(*a.shape[:2], r.heads, -1) for a in jnp.split(qkv, 3, -1))
        a = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(h.shape)
        h = h + dropout(linear(f"{i}.o", a))
        a = jax.nn.gelu(linear(f"{i}.up", norm(f"{i}.ln2", h)))
        h = h + dropout(linear(f"{i}.dn", a))
    logits = linear("head", norm("ln", h))
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
