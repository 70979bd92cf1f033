"""The reference model in PyTorch, exact and as people write it, to measure what exactness costs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cruxy_exact.reference import Reference
from cruxy_torch.exact import functional, modules
from cruxy_torch.exact._settings import use
from cruxy_torch.exact.optimizers import AdamW, clip_grad_norm_


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
        h = self.tok(x) + self.pos(torch.arange(x.shape[1], dtype=torch.int64, device=x.device))
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


class _ExactBlock(nn.Module):
    def __init__(self, r: Reference, number: int) -> None:
        super().__init__()
        drop, first = 1 - r.keep / 256, 1000 + 2 * number
        self.ln1, self.ln2 = modules.LayerNorm(r.width), modules.LayerNorm(r.width)
        self.attention = modules.Attention(r.width, r.heads, causal=True)
        self.up = modules.Linear(r.width, 4 * r.width)
        self.dn = modules.Linear(4 * r.width, r.width)
        self.drop1 = modules.Dropout(drop, first, r.seed)
        self.drop2 = modules.Dropout(drop, first + 1, r.seed)

    def forward(self, h: Tensor) -> Tensor:
        h = functional.add(h, self.drop1(self.attention(self.ln1(h))))
        hidden = functional.gelu(self.up(self.ln2(h)), "tanh")
        return functional.add(h, self.drop2(self.dn(hidden)))


class ReferenceModel(nn.Module):
    """The reference model of `cruxy_exact`, of exact modules and with its first parameters.

    Args:
        reference: the model.
        like: a tensor on the device.
    """

    def __init__(self, reference: Reference, like: Tensor) -> None:
        super().__init__()
        r = self.reference = reference
        self.tok = modules.Embedding(r.vocabulary, r.width)
        self.pos = modules.Embedding(r.length, r.width)
        self.blocks = nn.ModuleList(_ExactBlock(r, i) for i in range(r.blocks))
        self.ln, self.head = modules.LayerNorm(r.width), modules.Linear(r.width, r.vocabulary)
        self.to(like.device)
        start = r.init(like, xp=torch)
        with torch.no_grad():
            for name, p in self.named().items():
                p.copy_(start[name])

    def named(self) -> dict[str, Tensor]:
        """The parameters under the names and in the layout that the reference has them in."""
        parts: dict[str, nn.Module] = {"ln": self.ln, "head": self.head}
        for i, block in enumerate(self.blocks):
            parts |= {f"{i}.{name}": getattr(block, name) for name in ("ln1", "ln2", "up", "dn")}
            parts |= {f"{i}.qkv": block.attention.qkv, f"{i}.o": block.attention.out}  # pyright: ignore
        out: dict[str, Any] = {"tok": self.tok.weight, "pos": self.pos.weight}
        for name, part in parts.items():
            out[f"{name}.w"] = part.weight.t() if part.weight.ndim == 2 else part.weight  # pyright: ignore
            out[f"{name}.b"] = part.bias
        return out

    def forward(self, x: Tensor) -> Tensor:
        """The logits of `x`, whole numbers, `[batch, length]`."""
        places = torch.arange(x.shape[1], dtype=torch.int64, device=x.device).expand(x.shape)
        h = functional.add(self.tok(x), self.pos(places))
        for block in self.blocks:
            h = block(h)
        return self.head(self.ln(h))


def exact_step(reference: Reference, like: Tensor) -> Callable[[int], ReferenceModel]:
    """A step of exact training of the reference model, with exact modules and optimizer.

    Args:
        reference: the model; the engine of its precision holds for all products from then on.
        like: a tensor on the device.

    Returns:
        A function of the number of the step, which returns the model.
    """
    model = ReferenceModel(reference, like)
    optimizer = AdamW(model.parameters(), lr=reference.lr)
    count = reference.batch * reference.length

    def step(number: int) -> ReferenceModel:
        use(bits=reference.precision.bits, engine=reference.precision.engine)
        modules.set_step(model, number)
        x, y = reference.data(number, like, xp=torch)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        for p in model.parameters():
            p.grad = functional.scale(p.grad, 1 / count)  # pyright: ignore[reportArgumentType]
        clip_grad_norm_(model.parameters(), reference.clip)
        optimizer.step()
        return model

    return step
