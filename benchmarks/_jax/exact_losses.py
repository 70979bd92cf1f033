"""The demo's GPT trained exactly and plainly in JAX, from the same weights on the same batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.workloads import load
from cruxy_optax import exact

# The demo's own module, found through the path that `benchmarks.workloads` sets.
from _demo import MODELS, GPTConfig  # isort: skip

DECAY = 0.1
"""Weight decay of AdamW in both."""


def train(name: str, seed: int, steps: int, data: str | None, *, exactly: bool) -> dict[str, Any]:
    """Trains a language model under AdamW whose rate rises and falls along half a cosine.

    Args:
        name: of the workload, `shakespeare-small` or `shakespeare-paper`.
        seed: of weights and batches.
        steps: of the optimizer.
        data: a text file; `None` for the text that the workload comes with.
        exactly: whether every operation is exact, or JAX's, optax's and Flax's own.

    Returns:
        The figure on held-out text, which the plain model computes for both, and the checksum of
        the parameters.
    """
    workload, model = load(name, data, "jax"), MODELS[name.rpartition("-")[2]]
    schedule: Any = exact.warmup_cosine(model.learning_rate, warmup=steps // 20, steps=steps)
    tx: Any = optax.adamw(schedule, weight_decay=DECAY)
    loss: Callable[..., Any] = workload.loss
    if exactly:
        count = model.batch * model.config.context
        adamw = exact.adamw(schedule, weight_decay=DECAY)
        tx = optax.chain(exact.scale_by_count(count), adamw)
        loss = lambda params, windows: _exact_loss(model.config, params, windows)  # noqa: E731
    apply = exact.apply_updates if exactly else optax.apply_updates

    @jax.jit
    def step(params: Any, state: Any, windows: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, windows), state, params)
        return apply(params, updates), state

    params = workload.init(seed)
    state = tx.init(params)
    for _, windows in zip(range(steps), workload.batches(seed), strict=False):
        params, state = step(params, state, jnp.asarray(windows, jnp.int32))
    held_out = float(np.asarray(workload.held_out(params)))
    return {"held_out": held_out, "checksum": exact.checksum(nnx.to_pure_dict(params))}


def _exact_loss(config: GPTConfig, params: Any, windows: Any) -> jax.Array:
    """The sum of the cross entropy of the demo's GPT, of exact functions."""
    p: Any = nnx.to_pure_dict(params)
    x, y = windows[:, :-1], windows[:, 1:]

    def norm(layer: Any, h: Any) -> Any:
        return exact.layer_norm(h, layer["scale"], jnp.zeros_like(layer["scale"]), eps=1e-6)

    def linear(layer: Any, h: Any) -> Any:
        return exact.linear(h, layer["kernel"])

    tokens = p["tokens"]["embedding"]
    places = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape)
    h = exact.add(exact.embed(tokens, x), exact.embed(p["positions"]["embedding"], places))
    for i in range(config.layers):
        block = p["blocks"][i]
        qkv = linear(block["attention_in"], norm(block["attention_norm"], h))
        attended = exact.fused_attention(qkv, config.heads)
        h = exact.add(h, linear(block["attention_out"], attended))
        hidden = exact.gelu(linear(block["mlp_in"], norm(block["mlp_norm"], h)))
        h = exact.add(h, linear(block["mlp_out"], hidden))
    logits = exact.linear(norm(p["norm"], h), tokens.T)
    return exact.sum(exact.softmax_cross_entropy_with_integer_labels(logits, y))
