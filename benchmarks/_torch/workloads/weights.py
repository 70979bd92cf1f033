"""The weights that a model starts from: those that its twin in JAX draws from the same seed.

Runs of both frameworks are compared seed by seed, so both have to start alike, and PyTorch has to
do so where JAX is not installed. JAX draws random bits by counting, so NumPy can draw the same
ones; Flax gives each parameter a key by its number in the model, which is the same where a model
defines the same layers in the same order. What the bits become agrees to four roundings of a
float32: each side has an inverse error function of its own. Figures from before this file started
at the weights that JAX drew, and differ from today's by what those roundings do.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

Key = tuple[int, int]
"""Two whole numbers in [0, 2^32)."""

Deviation = Callable[[str], float | None]
"""The name of a weight to its standard deviation, or to `None` for that of LeCun."""

# Flax has a kernel's outputs last and its inputs before them, PyTorch the outputs first.
_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA

_TRUNCATED = 0.87962566103423978
"""The standard deviation of a normal distribution that is cut off at 2 of its own."""


def start(model: nn.Module, seed: int, deviation: Deviation) -> nn.Module:
    """Gives a new model its weights; biases are 0, and the gains of norms 1.

    Args:
        model: on the CPU; changed in place. Its layers are linear ones, convolutions of two axes,
            embeddings and layer norms, defined in the order in which its twin defines them.
        seed: of the run, in [0, 2^32).
        deviation: of each matrix. `None` is LeCun's, which is one over the root of the number of
            inputs, and cuts the distribution off at two of it.

    Returns:
        The same model.
    """
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.ndim < 2:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            layer = model.get_submodule(name.rpartition(".")[0])
            embeds = isinstance(layer, nn.Embedding)
            axes = tuple(range(parameter.ndim)) if embeds else _AXES[parameter.ndim]
            # The shape in Flax, from which `axes` leads to PyTorch's.
            shape = tuple(parameter.shape[axes.index(axis)] for axis in range(parameter.ndim))
            drawn = _draw(_fold_in((0, seed), number), shape, deviation(name))
            parameter.copy_(torch.from_numpy(drawn.transpose(axes).copy()))
    return model


def _fold_in(key: Key, number: int) -> Key:
    """The key that comes of a key and a number, as in `jax.random.fold_in`."""
    x, y = _threefry(key, np.zeros(1, np.uint32), np.full(1, number, np.uint32))
    return int(x[0]), int(y[0])


def _draw(key: Key, shape: tuple[int, ...], deviation: float | None) -> np.ndarray:
    """Normal float32 numbers."""
    count = math.prod(shape)
    if deviation is None:
        edge = np.float32(math.erf(math.sqrt(2.0)))
        inputs = np.float32(count // shape[-1])
        scale = np.sqrt(np.float32(1.0) / inputs) / np.float32(_TRUNCATED)
        uniform = _uniform(key, count, -edge, edge)
    else:
        scale = np.float32(deviation)
        one = np.float32(1.0)
        uniform = _uniform(key, count, np.nextafter(-one, one), one)
    return (scale * (np.float32(math.sqrt(2.0)) * _inverse_erf(uniform))).reshape(shape)


def _uniform(key: Key, count: int, low: np.float32, high: np.float32) -> np.ndarray:
    """`count` float32 numbers from `low` up to `high`, as `jax.random.uniform` has them."""
    first, second = _threefry(key, np.zeros(count, np.uint32), np.arange(count, dtype=np.uint32))
    # 23 random bits behind those of 1.0 are a number in [1, 2).
    ones = (((first ^ second) >> np.uint32(9)) | np.uint32(0x3F800000)).view(np.float32)
    # XLA rounds product and sum together, once; float64 holds the product exactly.
    spread = (ones - np.float32(1.0)).astype(np.float64) * np.float64(high - low)
    return np.maximum(low, (spread + np.float64(low)).astype(np.float32))


def _inverse_erf(x: np.ndarray) -> np.ndarray:
    """Of float32 numbers; XLA's starts from their squares, whose rounding tells near 1."""
    root = torch.from_numpy(np.sqrt((x * x).astype(np.float64)))
    return np.copysign(torch.erfinv(root).numpy().astype(np.float32), x)


def _threefry(key: Key, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32, 20 rounds: random bits for each pair of counters, all uint32.

    References:
        Salmon et al., [Parallel Random Numbers: As Easy as 1, 2, 3](
        https://doi.org/10.1145/2063384.2063405), SC 2011, section 4.2.
    """
    keys = tuple(np.uint32(k) for k in (*key, key[0] ^ key[1] ^ _PARITY))
    x, y = x + keys[0], y + keys[1]
    for block in range(5):
        for turn in _ROTATIONS[block % 2]:
            x = x + y
            y = x ^ ((y << np.uint32(turn)) | (y >> np.uint32(32 - turn)))
        x = x + keys[(block + 1) % 3]
        y = y + keys[(block + 2) % 3] + np.uint32(block + 1)
    return x, y
