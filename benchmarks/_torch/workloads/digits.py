"""Small image classifiers in PyTorch: a convolutional net and a vision transformer.

Layers are defined in the order of their twins in JAX, which `weights.py` goes by.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks._torch.device import DEVICE
from benchmarks._torch.workloads.weights import start
from benchmarks.workloads import Workload
from benchmarks.workloads.digits import CLASSES, PATCH, SIDE, Batch, split, workload

gelu = functools.partial(functional.gelu, approximate="tanh")


class ConvNet(nn.Module):
    """Three 3 x 3 convolutions, the last two of stride 2, and a linear layer on their output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.third = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.out = nn.Linear(64 * (SIDE // 4) ** 2, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape `(batch, 10)`, of `images`, shape `(batch, 8, 8, 1)`."""
        x = images.movedim(-1, 1)
        for layer in (self.first, self.second, self.third):
            x = gelu(layer(x))
        # Channels last, as the linear layer's weights expect them.
        return self.out(x.movedim(1, -1).flatten(1))


class Block(nn.Module):
    """Self-attention, then a GELU layer four times as wide; both pre-norm and residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream, shape `(batch, patches, width)`, one block on."""
        batch, patches, width = x.shape
        qkv = self.attention_in(self.attention_norm(x))
        qkv = qkv.reshape(batch, patches, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*qkv)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, patches, width))
        return x + self.mlp_out(gelu(self.mlp_in(self.mlp_norm(x))))


class ViT(nn.Module):
    """A vision transformer on four patches, whose outputs are averaged."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH**2, width)
        self.positions = nn.Embedding((SIDE // PATCH) ** 2, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape `(batch, 10)`, of `images`, shape `(batch, 8, 8, 1)`."""
        rows = SIDE // PATCH
        x = images.reshape(-1, rows, PATCH, rows, PATCH).transpose(2, 3)
        x = self.patches(x.reshape(-1, rows**2, PATCH**2)) + self.positions.weight
        return self.out(self.norm(self.blocks(x)).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {"conv": ConvNet, "vit": ViT}


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats per image."""
    images, labels = (torch.from_numpy(array).to(DEVICE) for array in batch)
    return functional.cross_entropy(model(images), labels.long())


@torch.no_grad()
def held_out(model: nn.Module) -> float:
    """`loss` on all held-out images."""
    return loss(model, split().held_out).item()


def _deviation(name: str) -> float | None:
    """Of the positions as in Flax's ViT; all others have LeCun's."""
    return 0.02 if name == "positions.weight" else None


@functools.cache
def digits(model: str) -> Workload:
    """A classifier; its weights and the order of the images are drawn from the run's seed.

    Args:
        model: a key of `MODELS`.
    """

    def init(seed: int) -> nn.Module:
        return start(MODELS[model](), seed, _deviation).to(DEVICE)

    return workload(model, init=init, loss=loss, held_out=held_out)
