"""The two sums behind the norms, `sum g^2` and `sum |g|^gamma`, in one pass over a leaf.

The norms are the only thing the controller costs beyond an ordinary optimizer step, and on a CPU
they cost most of it, so their form is chosen by measurement (`python -m benchmarks step-time`).
"""

import jax
import jax.numpy as jnp
from jax import lax

from cruxy_optax._distributed.axes import is_spread, sum_in_parts
from cruxy_optax._tree import accumulator_dtype, root

_BLOCK = 16
"""Rows summed in one go on a CPU. Over a constant axis of up to 16 the loop is unrolled and
vectorised; at 32 the same code takes ten times as long."""

_SMALL = 2048
"""Elements up to which one plain loop is cheapest, and its one accumulator exact enough."""


def power_sums(leaf: jax.Array, gamma: float) -> tuple[jax.Array, jax.Array]:
    """`(sum g^2, sum |g|^gamma)` over one leaf, in its accumulator dtype.

    Args:
        leaf: any real array.
        gamma: exponent of the second sum, at least 1.

    Returns:
        Two scalars, in parts where `sum_in_parts` leaves them so. NaN, infinity and overflow in any
        element reach both.
    """
    leaf = leaf.astype(accumulator_dtype(leaf))
    if gamma == 2.0:
        squares = sum_in_parts(leaf * leaf)
        return squares, squares
    if _fits_one_pass(leaf):
        return lax.platform_dependent(
            leaf,
            cpu=lambda x: _one_pass(x, gamma),
            default=lambda x: _two_sums(x, gamma),
        )
    return _two_sums(leaf, gamma)


def _fits_one_pass(leaf: jax.Array) -> bool:
    if is_spread(leaf):
        return False  # XLA gathers a reduction of pairs that is split over devices
    return leaf.size <= _SMALL or (leaf.ndim >= 2 and leaf.shape[-2] % _BLOCK == 0)


def _terms(x: jax.Array, gamma: float) -> tuple[jax.Array, jax.Array]:
    size = jnp.abs(x)
    # `pow` costs several times the rest of the optimizer step; 1.5 does without.
    return x * x, size * root(size) if gamma == 1.5 else size**gamma


def _two_sums(x: jax.Array, gamma: float) -> tuple[jax.Array, jax.Array]:
    """What XLA fuses into one pass by itself on a GPU, and never on a CPU."""
    squares, powers = _terms(x, gamma)
    return sum_in_parts(squares), sum_in_parts(powers)


def _one_pass(x: jax.Array, gamma: float) -> tuple[jax.Array, jax.Array]:
    """Both sums out of one loop: a reduction of pairs, over few rows at a time."""
    if x.size <= _SMALL:
        return _sum_pairs(x, gamma, tuple(range(x.ndim)))
    *leading, rows, columns = x.shape
    blocks = x.reshape(*leading, rows // _BLOCK, _BLOCK, columns)
    squares, powers = _sum_pairs(blocks, gamma, (blocks.ndim - 2,))
    return jnp.sum(squares), jnp.sum(powers)


def _sum_pairs(x: jax.Array, gamma: float, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    def add(
        a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return a[0] + b[0], a[1] + b[1]

    zero = jnp.zeros((), x.dtype)
    return lax.reduce(_terms(x, gamma), (zero, zero), add, axes)
