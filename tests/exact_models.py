"""The reference model of `cruxy_exact` built of PyTorch's exact modules."""

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpointed

from cruxy_torch import exact


class Block(nn.Module):
    def __init__(self, r, i):
        super().__init__()
        self.ln1, self.ln2 = exact.LayerNorm(r.width), exact.LayerNorm(r.width)
        self.attention = exact.Attention(r.width, r.heads, causal=True)
        self.up, self.dn = exact.Linear(r.width, 4 * r.width), exact.Linear(4 * r.width, r.width)
        self.gelu = exact.GELU("tanh")
        drop = 1 - r.keep / 256
        self.drop1 = exact.Dropout(drop, 1000 + 2 * i, r.seed)
        self.drop2 = exact.Dropout(drop, 1001 + 2 * i, r.seed)

    def forward(self, h):
        h = exact.add(h, self.drop1(self.attention(self.ln1(h))))
        return exact.add(h, self.drop2(self.dn(self.gelu(self.up(self.ln2(h))))))


class GPT(nn.Module):
    """The reference model."""

    def __init__(self, reference, checkpoint=False):
        super().__init__()
        r = self.reference = reference
        self.checkpoint = checkpoint
        self.tok = exact.Embedding(r.vocabulary, r.width)
        self.pos = exact.Embedding(r.length, r.width)
        self.blocks = nn.ModuleList(Block(r, i) for i in range(r.blocks))
        self.ln, self.head = exact.LayerNorm(r.width), exact.Linear(r.width, r.vocabulary)
        with torch.no_grad():
            start = r.init(torch.zeros(1), xp=torch)
            for name, p in self.named().items():
                p.copy_(start[name])

    def named(self):
        """Parameters under the reference's names; weights as it has them, `[in, out]`."""
        out = {"tok": self.tok.weight, "pos": self.pos.weight}
        parts = {"ln": self.ln, "head": self.head}
        for i, block in enumerate(self.blocks):
            parts |= {f"{i}.ln1": block.ln1, f"{i}.ln2": block.ln2, f"{i}.up": block.up}
            parts |= {f"{i}.qkv": block.attention.qkv, f"{i}.o": block.attention.out}
            parts[f"{i}.dn"] = block.dn
        for name, part in parts.items():
            out[f"{name}.w"] = part.weight.t() if part.weight.ndim == 2 else part.weight
            out[f"{name}.b"] = part.bias
        return out

    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape)
        h = exact.add(self.tok(x), self.pos(places))
        for block in self.blocks:
            h = checkpointed(block, h, use_reentrant=False) if self.checkpoint else block(h)
        return self.head(self.ln(h))


def batch(reference, step):
    x, y = reference.data(step, torch.zeros(1), xp=torch)
    return x, y


def train(model, steps, begin=0, optimizer=None, both=False):
    r = model.reference
    optimizer = optimizer or exact.AdamW(model.parameters(), lr=r.lr)
    for step in range(begin, steps):
        exact.set_step(model, step)
        x, y = batch(r, step)
        optimizer.zero_grad()
        exact.cross_entropy(model(x), y).backward()
        for p in model.parameters():
            p.grad = exact.scale(p.grad, 1 / (r.batch * r.length))
        exact.clip_grad_norm_(model.parameters(), r.clip)
        optimizer.step()
    return (model, optimizer) if both else model


def reference_state(reference, steps):
    """The parameters of the reference after some steps in NumPy."""
    with np.errstate(all="ignore"):
        state = reference.start(np.zeros(1, np.float32), xp=np)
        for step in range(steps):
            state, _ = reference.step(state, step, xp=np)
    return state.params
