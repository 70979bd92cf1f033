"""The model the demo trains: a small GPT-2 (Radford et al. 2019) without biases, in Flax NNX."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from _demo import GPTConfig


class Block(nnx.Module):
    """Causal self-attention, then a GELU layer four times as wide; both pre-norm and residual."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs) -> None:
        width = config.width
        # A residual stream sums 2 * layers branches; this keeps its variance at one branch's.
        residual_std = 0.02 / math.sqrt(2 * config.layers)
        self.heads = config.heads
        self.attention_norm = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.attention_in = _linear(width, 3 * width, 0.02, rngs)
        self.attention_out = _linear(width, width, residual_std, rngs)
        self.mlp_norm = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.mlp_in = _linear(width, 4 * width, 0.02, rngs)
        self.mlp_out = _linear(4 * width, width, residual_std, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, time, width = x.shape
        # One row a token: XLA on CPU sums a kernel's gradient over one axis faster than over two.
        rows = x.reshape(batch * time, width)
        qkv = self.attention_in(self.attention_norm(rows))
        qkv = qkv.reshape(batch, time, 3, self.heads, width // self.heads)
        attended = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), is_causal=True)
        rows = rows + self.attention_out(attended.reshape(batch * time, width))
        rows = rows + self.mlp_out(jax.nn.gelu(self.mlp_in(self.mlp_norm(rows))))
        return rows.reshape(batch, time, width)


def _linear(inputs: int, outputs: int, std: float, rngs: nnx.Rngs) -> nnx.Linear:
    init = jax.nn.initializers.normal(std)
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs)


class GPT(nnx.Module):
    """Token ids in, logits of the next token at every position out.

    Args:
        config: the shape.
        vocabulary: number of different tokens.
        rngs: draws the initial weights.
        tied: whether the output layer is the transposed token embedding, or one of its own.
    """

    def __init__(
        self, config: GPTConfig, vocabulary: int, *, rngs: nnx.Rngs, tied: bool = True
    ) -> None:
        init = jax.nn.initializers.normal(0.02)
        self.tokens = nnx.Embed(vocabulary, config.width, embedding_init=init, rngs=rngs)
        self.positions = nnx.Embed(config.context, config.width, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(config.width, use_bias=False, rngs=rngs)
        self.head = None if tied else _linear(config.width, vocabulary, 0.02, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits, float32, `(batch, time, vocabulary)`, of int32 `tokens`, `(batch, time)`."""
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        rows = self.norm(x.reshape(-1, x.shape[-1]))
        logits = self.tokens.attend(rows) if self.head is None else self.head(rows)
        return logits.reshape(*tokens.shape, -1)
