"""Where an element lies in a model, so that its random bits are its own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Place(NamedTuple):
    """Where a part of a model lies in the whole, so that its random bits are its own.

    `release_gradients` hands it down as the extra argument `place`.

    Attributes:
        leaf: how many leaves come before it.
        layer: its index in leaves that are stacks of such parts; int32.
    """

    leaf: int = 0
    layer: jax.Array | int = 0


WHOLE = Place()
"""The place of what is no part."""


def element_numbers(shape: tuple[int, ...], layer: jax.Array | int = 0) -> jax.Array:
    """The row-major number of each element of an array of this shape; int32, wrapping.

    Args:
        shape: of the array.
        layer: its index in a stack of such arrays, through which elements are numbered.
    """
    number, stride = jnp.zeros(shape, jnp.int32), 1
    for axis in reversed(range(len(shape))):
        wrapped = (stride + 2**31) % 2**32 - 2**31
        number = number + lax.broadcasted_iota(jnp.int32, shape, axis) * wrapped
        stride *= shape[axis]
    return number + layer * ((stride + 2**31) % 2**32 - 2**31)
