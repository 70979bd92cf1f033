"""The PyTorch side of `exact_training.py`."""

import argparse
import os
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cruxy_exact import initial
from cruxy_exact.random_bits import random_bits
from cruxy_exact.reference import Reference
from cruxy_torch import exact

REFERENCE = Reference(grain=1)
SIDE, PATCH, CLASSES, WIDTH = 16, 4, 8, 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class ViT(nn.Module):
    """A small ViT: patches, two blocks, a linear head on all tokens."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.patch = exact.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.count = (SIDE // PATCH) ** 2
        self.pos = exact.Embedding(self.count, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.ln, self.head = exact.LayerNorm(WIDTH), exact.Linear(self.count * WIDTH, CLASSES)
        self.to(like.device)
        with torch.no_grad():
            for leaf, (name, p) in enumerate(sorted(self.named().items())):
                if p.ndim > 1:
                    scale = 0.03 if name == "pos" else 1 / (p.numel() / p.shape[-1]) ** 0.5
                    key = REFERENCE.key(0, 100 + leaf, like, xp=torch)
                    p.copy_(initial.uniform(p.shape, scale, key, xp=torch))
                elif "ln" not in name:
                    p.zero_()

    def named(self) -> dict[str, Tensor]:
        """The parameters as they are saved: `[in, out]`, and `[kh, kw, in, out]`."""
        out = {}
        for name, p in self.named_parameters():
            name = name.replace("blocks.", "").replace(".weight", ".w").replace(".bias", ".b")
            out["pos" if name == "pos.w" else name] = laid_out(name, p)
        return out

    def forward(self, images: Tensor) -> Tensor:
        """The logits of `[B, 1, 16, 16]`."""
        h = self.patch(images).flatten(2).transpose(1, 2)
        places = torch.arange(self.count, device=h.device).expand(h.shape[:2])
        h = exact.add(h, self.pos(places))
        for block in self.blocks:
            h = block(h)
        return self.head(self.ln(h).flatten(1))


class Block(nn.Module):
    """Attention on all tokens, and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = exact.LayerNorm(WIDTH), exact.LayerNorm(WIDTH)
        self.attention = exact.Attention(WIDTH, 4)
        self.up, self.dn = exact.Linear(WIDTH, 2 * WIDTH), exact.Linear(2 * WIDTH, WIDTH)
        self.gelu = exact.GELU()

    def forward(self, h: Tensor) -> Tensor:
        """`[B, T, D]` to the same."""
        h = exact.add(h, self.attention(self.ln1(h)))
        return exact.add(h, self.dn(self.gelu(self.up(self.ln2(h)))))


def images(step: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Noise with a bright square whose place is the class; `[8, 1, 16, 16]` and `[8]`."""
    key = REFERENCE.key(step, 700, like, xp=torch)
    index = torch.arange(REFERENCE.batch, dtype=torch.int32, device=like.device)
    labels = (random_bits(key, index) >> 9) & (CLASSES - 1)
    shape = (REFERENCE.batch, 1, SIDE, SIDE)
    noise = initial.uniform(shape, 1.0, REFERENCE.key(step, 701, like, xp=torch), xp=torch)
    row = torch.arange(SIDE, device=like.device)
    bright = (row[None, :, None] // 2 == labels[:, None, None]) & (row[None, None, :] > 7)
    return noise + bright[:, None].float(), labels


def laid_out(name: str, tensor: Tensor) -> Tensor:
    """A weight as it is saved."""
    if name.endswith(".w") and name != "pos.w" and tensor.ndim > 1:
        return tensor.t() if tensor.ndim == 2 else tensor.permute(2, 3, 1, 0)
    return tensor


def train(options: argparse.Namespace) -> str:
    """Trains, prints the loss now and then and the checksum, and returns that."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("gloo" if DEVICE.type == "cpu" else "nccl")
    rank = dist.get_rank() if world > 1 else 0
    like = torch.zeros(1, device=DEVICE)
    is_gpt = options.model == "gpt"
    model: Any = exact.ReferenceModel(REFERENCE, like) if is_gpt else ViT(like)
    optimizer = exact.AdamW(model.parameters(), lr=REFERENCE.lr)
    begin = load(options.load, model, optimizer) if options.load else 0
    grains = exact.GrainAccumulator(model)
    count = REFERENCE.batch * (REFERENCE.length if is_gpt else 1)
    for step in range(begin, options.steps):
        x, y = REFERENCE.data(step, like, xp=torch) if is_gpt else images(step, like)
        for part in np.array_split(np.arange(REFERENCE.batch), options.micro_batches):
            for i in part[rank::world]:  # a sample is a grain
                exact.set_step(model, step, int(i))
                loss = exact.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
                loss.backward()
                grains.add(loss)
        mean = grains.finish(count)  # over all micro-batches and processes
        exact.clip_grad_norm_(model.parameters(), REFERENCE.clip)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step % 10 == 0 or step == options.steps - 1):
            print(f"step {step}: loss {float(mean):.3f}")
    checksum = exact.checksum(model.named(), grain=REFERENCE.grain)
    if rank == 0:
        print(f"checksum {checksum}")
        if options.save:
            save(options.save, model, optimizer, options.steps)
    if world > 1:
        dist.destroy_process_group()
    return checksum


def save(path: Any, model: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Parameters, moments, products of decay rates and the number of steps."""
    arrays: dict[str, Any] = {"steps": np.int32(steps)}
    for (name, p), raw in zip(model.named().items(), ordered(model), strict=True):
        state = optimizer.state[raw]
        arrays["products"] = np.float32(state["products"])
        shaped = {"p": p, "m": turned(raw, p, state["exp_avg"])}
        shaped["v"] = turned(raw, p, state["exp_avg_sq"])
        for kind, tensor in shaped.items():
            arrays[f"{kind}/{name}"] = tensor.detach().cpu().numpy()
    np.savez(path, **arrays)


def load(path: Any, model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Takes up a saved run; the number of steps that it has."""
    arrays = np.load(path)
    with torch.no_grad():
        for (name, p), raw in zip(model.named().items(), ordered(model), strict=True):
            state = {"exp_avg": torch.zeros_like(raw), "exp_avg_sq": torch.zeros_like(raw)}
            targets = (p, turned(raw, p, state["exp_avg"]), turned(raw, p, state["exp_avg_sq"]))
            for kind, target in zip("pmv", targets, strict=True):
                target.copy_(torch.from_numpy(arrays[f"{kind}/{name}"]))
            products = tuple(float(x) for x in arrays["products"])
            optimizer.state[raw] = {**state, "products": products}
    return int(arrays["steps"])


def ordered(model: Any) -> list[nn.Parameter]:
    """The parameters in the order of `model.named()`."""
    by_memory = {p.data_ptr(): p for p in model.parameters()}
    return [by_memory[view.data_ptr()] for view in model.named().values()]


def turned(raw: Tensor, view: Tensor, other: Tensor) -> Tensor:
    """Another tensor of the shape of a parameter, seen as `view` sees the parameter."""
    if view.shape == raw.shape and view.stride() == raw.stride():
        return other
    return other.t() if raw.ndim == 2 else other.permute(2, 3, 1, 0)
