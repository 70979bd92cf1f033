"""Models by name, as shapes alone, and how they are usually split over a mesh."""

import math
from collections.abc import Mapping
from typing import NamedTuple

Spec = tuple[str | None, ...]
"""The axis of the mesh that each axis of a tensor is split along."""


class Tensor(NamedTuple):
    """A parameter.

    Attributes:
        shape: `(inputs, outputs)` of a matrix, behind the layers where they are stacked.
        spec: how it is split where the mesh has both axes, `"data"` and `"model"`.
        role: see `cruxy_control.roles`.
    """

    shape: tuple[int, ...]
    spec: Spec
    role: str


class Llama(NamedTuple):
    """A Llama with grouped keys and values and an untied output head.

    Attributes:
        layers: number of transformer blocks.
        width: of the residual stream.
        hidden: of the MLP.
        heads: of the queries.
        shared: heads of keys and values.
        vocabulary: number of tokens.
    """

    layers: int
    width: int
    hidden: int
    heads: int
    shared: int
    vocabulary: int = 32000


MODELS = {
    "llama-1b": Llama(22, 2048, 5632, 32, 4),
    "llama-7b": Llama(32, 4096, 11008, 32, 32),
    "llama-13b": Llama(40, 5120, 13824, 40, 40),
    "llama-70b": Llama(80, 8192, 28672, 64, 8),
}
"""TinyLlama-1.1B (arXiv:2401.02385), LLaMA 7B and 13B (arXiv:2302.13971), Llama 2 70B
(arXiv:2307.09288)."""

INTO, OUT_OF = ("data", "model"), ("model", "data")
"""Megatron's split of the matrix into a block and out of it, the rest along `data`."""


def tensors(model: Llama, *, stacked: bool = False) -> dict[str, Tensor]:
    """The parameters by dotted path.

    Args:
        model: see there.
        stacked: whether all layers are one tensor each, as `nnx.scan` makes them.
    """
    narrow = model.width // model.heads * model.shared
    block = {
        "self_attn.q_proj.kernel": Tensor((model.width, model.width), INTO, "attention.q"),
        "self_attn.k_proj.kernel": Tensor((model.width, narrow), INTO, "attention.k"),
        "self_attn.v_proj.kernel": Tensor((model.width, narrow), INTO, "attention.v"),
        "self_attn.o_proj.kernel": Tensor((model.width, model.width), OUT_OF, "attention.out"),
        "mlp.gate_proj.kernel": Tensor((model.width, model.hidden), INTO, "mlp.gate"),
        "mlp.up_proj.kernel": Tensor((model.width, model.hidden), INTO, "mlp.up"),
        "mlp.down_proj.kernel": Tensor((model.hidden, model.width), OUT_OF, "mlp.down"),
        "input_layernorm.scale": Tensor((model.width,), (None,), "norm"),
        "post_attention_layernorm.scale": Tensor((model.width,), (None,), "norm"),
    }
    found = {
        "embed_tokens.embedding": Tensor((model.vocabulary, model.width), OUT_OF, "embedding"),
        "norm.scale": Tensor((model.width,), (None,), "norm"),
        "lm_head.kernel": Tensor((model.width, model.vocabulary), INTO, "head"),
    }
    if stacked:
        layers = model.layers
        found |= {
            f"layers.{name}": Tensor((layers, *own.shape), (None, *own.spec), own.role)
            for name, own in block.items()
        }
        return found
    for layer in range(model.layers):
        found |= {f"layers.{layer}.{name}": own for name, own in block.items()}
    return found


def split(tensor: Tensor, mesh: Mapping[str, int]) -> Spec:
    """How a tensor is split over a mesh, which may lack an axis.

    Raises:
        ValueError: where an axis of the tensor does not divide.
    """
    spec = tuple(axis if axis in mesh else None for axis in tensor.spec)
    for size, axis in zip(tensor.shape, spec, strict=True):
        if axis is not None and size % mesh[axis]:
            raise ValueError(
                f"--mesh must divide the model, got {axis}={mesh[axis]} for an axis of {size}; "
                "give a smaller one."
            )
    return spec


def count(parameters: Mapping[str, Tensor]) -> int:
    """The number of elements."""
    return sum(math.prod(own.shape) for own in parameters.values())
