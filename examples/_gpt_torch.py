"""The model the demo trains, in PyTorch: `_gpt.py` says what it is."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from _demo import GPTConfig


class Block(nn.Module):
    """Causal self-attention, then a GELU layer four times as wide; both pre-norm and residual."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.width
        # A residual stream sums 2 * layers branches; this keeps its variance at one branch's.
        residual_std = 0.02 / math.sqrt(2 * config.layers)
        self.heads = config.heads
        self.attention_norm = _norm(width)
        self.attention_in = _linear(width, 3 * width, 0.02)
        self.attention_out = _linear(width, width, residual_std)
        self.mlp_norm = _norm(width)
        self.mlp_in = _linear(width, 4 * width, 0.02)
        self.mlp_out = _linear(4 * width, width, residual_std)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream, shape `(batch, time, width)`, one block on."""
        batch, time, width = x.shape
        qkv = self.attention_in(self.attention_norm(x))
        qkv = qkv.reshape(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, time, width))
        hidden = functional.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        return x + self.mlp_out(hidden)


class GPT(nn.Module):
    """Token ids in, logits of the next token at every position out.

    The initial weights are drawn from PyTorch's global generator.

    Args:
        config: the shape.
        vocabulary: number of different tokens.
    """

    def __init__(self, config: GPTConfig, vocabulary: int) -> None:
        super().__init__()
        self.tokens = _embedding(vocabulary, config.width)
        self.positions = _embedding(config.context, config.width)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm = _norm(config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, shape `(batch, time, vocabulary)`, of integer `tokens`, `(batch, time)`.

        The output layer is the transposed token embedding.
        """
        x = self.tokens(tokens) + self.positions(
            torch.arange(tokens.shape[1], device=tokens.device)
        )
        return self.norm(self.blocks(x)) @ self.tokens.weight.T


def _linear(inputs: int, outputs: int, std: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


def _embedding(count: int, width: int) -> nn.Embedding:
    layer = nn.Embedding(count, width)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, bias=False)
