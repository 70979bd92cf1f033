"""Parameter sets of GPTs by size, and of a Llama, as shapes alone."""

from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]


def gpt_shapes(layers: int, width: int, vocabulary: int, context: int) -> Shapes:
    """The leaves of a GPT with biases, layer norms and an untied output head.

    Args:
        layers: number of transformer blocks.
        width: of the residual stream; the MLP is four times as wide.
        vocabulary: number of tokens.
        context: number of positions.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "token": (vocabulary, width),
        "position": (context, width),
        "head": (width, vocabulary),
        "norm.scale": (width,),
        "norm.bias": (width,),
    }
    for i in range(layers):
        shapes |= {
            f"{i}.attention.in": (width, 3 * width),
            f"{i}.attention.in_bias": (3 * width,),
            f"{i}.attention.out": (width, width),
            f"{i}.attention.out_bias": (width,),
            f"{i}.mlp.in": (width, 4 * width),
            f"{i}.mlp.in_bias": (4 * width,),
            f"{i}.mlp.out": (4 * width, width),
            f"{i}.mlp.out_bias": (width,),
            f"{i}.norm1.scale": (width,),
            f"{i}.norm1.bias": (width,),
            f"{i}.norm2.scale": (width,),
            f"{i}.norm2.bias": (width,),
        }
    return shapes


SIZES: dict[str, Shapes] = {
    "0.1m": gpt_shapes(2, 64, 65, 64),
    "0.8m": gpt_shapes(4, 128, 65, 64),
    "10m": gpt_shapes(6, 384, 65, 256),
    "100m": gpt_shapes(12, 768, 16384, 1024),
    "1b": gpt_shapes(24, 1792, 32000, 2048),
}
"""The parameter sets by name, about as many parameters each as the name says."""


def llama_shapes(
    layers: int, width: int, hidden: int, vocabulary: int, heads: int, key_value_heads: int
) -> Shapes:
    """The leaves of a Llama with grouped keys and values and an untied output head.

    Args:
        layers: number of transformer blocks.
        width: of the residual stream, a multiple of `heads`.
        hidden: of the MLP.
        vocabulary: number of tokens.
        heads: of the queries.
        key_value_heads: of keys and values.
    """
    narrow = width // heads * key_value_heads
    shapes: dict[str, tuple[int, ...]] = {
        "token": (vocabulary, width),
        "norm": (width,),
        "head": (width, vocabulary),
    }
    for i in range(layers):
        shapes |= {
            f"{i}.query": (width, width),
            f"{i}.key": (width, narrow),
            f"{i}.value": (width, narrow),
            f"{i}.out": (width, width),
            f"{i}.gate": (width, hidden),
            f"{i}.up": (width, hidden),
            f"{i}.down": (hidden, width),
            f"{i}.norm1": (width,),
            f"{i}.norm2": (width,),
        }
    return shapes


TINYLLAMA = llama_shapes(22, 2048, 5632, 32000, 32, 4)
"""TinyLlama-1.1B (Zhang et al. 2024, arXiv:2401.02385): 1,100,048,384 parameters."""
