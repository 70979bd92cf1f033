"""The reference model as people write it in PyTorch, to measure what exactness costs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cruxy_exact.reference import Reference


class _Block(nn.Module):
    def __init__(self, r: Reference) -> None:
        super().__init__()
        self.heads, drop = r.heads, 1 - r.keep / 256
        self.ln1, self.ln2 = nn.LayerNorm(r.width), nn.LayerNorm(r.width)
        self.qkv, self.o = nn.Linear(r.width, 3 * r.width), nn.Linear(r.width, r.width)
        self.up, self.dn = nn.Linear(r.width, 4 * r.width), nn.Linear(4 * r.width, r.width)
        self.drop = nn.Dropout(drop)

    def forward(self, h: Tensor) -> Tensor:
        b, t, d = h.shape
        q, k, v = self.qkv(self.ln1(h)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.drop(self.o(a.transpose(1, 2).reshape(b, t, d)))
        return h + self.drop(self.dn(F.gelu(self.up(self.ln2(h)), approximate="tanh")))


class _Model(nn.Module):
    def __init__(self, r: Reference) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(r.vocabulary, r.width), nn.Embedding(r.length, r.width)
        self.blocks = nn.Sequential(*(_Block(r) for _ in range(r.blocks)))
        self.ln, self.head = nn.LayerNorm(r.width), nn.Linear(r.width, r.vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tok(x) + self.pos(torch.arange(x.shape[1], device=x.device))
        return self.head(self.ln(self.blocks(h)))


def plain_step(reference: Reference, like: Tensor) -> Callable[[int], Any]:
    """A step of plain training of the reference model, with PyTorch's own layers.

    Args:
        reference: the model.
        like: a tensor on the device.

    Returns:
        A function of the number of the step.
    """
    model = _Model(reference).to(like.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=reference.lr, fused=True)

    def step(count: int) -> None:
        x, y = reference.data(count, like, xp=torch)
        optimizer.zero_grad()
        logits = model(x).flatten(0, 1)
        F.cross_entropy(logits, y.flatten().long()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), reference.clip)
        optimizer.step()

    return step
