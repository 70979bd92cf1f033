"""Large models on the meta device, and what each way of training keeps beside the weights."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytorch_optimizer
import torch
import transformers
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from benchmarks._torch.measured_optimizers import OPTIMIZERS
from cruxy_torch import AXIOM, CruxyOptimizer
from cruxy_torch._memory.estimate import option_bytes, stepped, tensor_bytes
from cruxy_torch._models.skeleton import skeleton

MODELS = {
    "TinyLlama, 1.1B": transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    ),
    "LLaMA, 7B": transformers.LlamaConfig(),
    "Yi, 34B": transformers.LlamaConfig(
        vocab_size=64000,
        hidden_size=7168,
        intermediate_size=20480,
        num_hidden_layers=60,
        num_attention_heads=56,
        num_key_value_heads=8,
    ),
}
"""The published shapes of three models, by name."""


class Way(NamedTuple):
    """One way to train.

    Attributes:
        label: what the table calls it.
        dtype: of weights and gradients.
        released: whether each gradient is freed as soon as its parameter is updated.
        make: makes the optimizer of parameters; given the rank of what is projected.
    """

    label: str
    dtype: torch.dtype
    released: bool
    make: Callable[[list[Any], int], Optimizer]


def _projected(kind: Any, **options: Any) -> Callable[[list[Any], int], Optimizer]:
    def make(params: list[Any], rank: int) -> Optimizer:
        matrices = {"params": [p for p in params if p.ndim == 2], "rank": rank, **options}
        shared = {"update_proj_gap": 200, "scale": 0.25}
        return kind([shared | matrices, {"params": [p for p in params if p.ndim != 2]}])

    return make


def _eight_bits(params: list[Any], rank: int) -> Optimizer:
    return OPTIMIZERS["torchao-adamw-8bit"].make(nn.ParameterList(params))


WAYS = (
    Way("AdamW", torch.float32, False, lambda p, _: AdamW(p, fused=False)),
    Way("AdamW, 8 bits (torchao)", torch.bfloat16, False, _eight_bits),
    Way("Adafactor", torch.bfloat16, False, lambda p, _: Adafactor(p)),
    Way(
        "GaLore",
        torch.bfloat16,
        False,
        _projected(pytorch_optimizer.GaLore, projection_type="std"),
    ),
    Way(
        "APOLLO",
        torch.bfloat16,
        False,
        _projected(pytorch_optimizer.APOLLO, projection_type="random", scale_type="channel"),
    ),
    Way("LOMO (SGD in the backward pass)", torch.bfloat16, True, lambda p, _: SGD(p)),
    Way("Meta3, 8 bits", torch.bfloat16, False, lambda p, _: CruxyOptimizer(p, state_bits=8)),
    Way(
        "Self-driving, 8 bits",
        torch.bfloat16,
        False,
        lambda p, _: CruxyOptimizer(p, mode="self_driving", state_bits=8),
    ),
    Way("AXIOM", torch.bfloat16, False, lambda p, _: AXIOM(p)),
    Way("AXIOM, gradients released", torch.bfloat16, True, lambda p, _: AXIOM(p)),
    Way(
        "AXIOM, momentum in 4 bits, gradients released",
        torch.bfloat16,
        True,
        lambda p, _: AXIOM(p, momentum=0.9),
    ),
)


def shapes_of(config: Any) -> dict[torch.Size, int]:
    """How many parameters of each shape a model has; no weight is made."""
    counts: dict[torch.Size, int] = {}
    for param in skeleton(config).parameters():
        counts[param.shape] = counts.get(param.shape, 0) + 1
    return counts


def held(way: Way, shapes: dict[torch.Size, int], rank: int) -> dict[str, int]:
    """Bytes that a way of training keeps: weights, gradients alive at once, optimizer state.

    Tensors of one shape take the same, so one of each takes a step on the meta device.
    """
    one_each: list[Tensor] = [torch.empty(s, dtype=way.dtype, device="meta") for s in shapes]
    with torch.compiler.set_stance("force_eager"):
        optimizer = stepped(one_each, lambda params: way.make(params, rank))
    state = option_bytes(optimizer)
    for group in optimizer.param_groups:
        for param in group["params"]:
            own = [vars(v) if hasattr(v, "ortho_matrix") else v for v in _values(optimizer, param)]
            state += shapes[param.shape] * tensor_bytes(own)
    sizes = {shape: way.dtype.itemsize * shape.numel() for shape in shapes}
    whole = sum(count * sizes[shape] for shape, count in shapes.items())
    gradients = max(sizes.values()) if way.released else whole
    return {"weights": whole, "gradients": gradients, "state": state}


def _values(optimizer: Optimizer, param: Any) -> Iterable[Any]:
    return optimizer.state[param].values()
