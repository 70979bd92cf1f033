"""Exact sums and matrix products: integers on a power-of-two scale, added without error.

The inputs are rounded to whole numbers on a scale of their row or column, those are added exactly,
and the sum is rounded once. The order, tiling, sharding and number of threads cannot matter.

All functions take and return float32 and the array namespace as `xp`. In JAX they need 64-bit
types: call them inside `jax.enable_x64(True)`.
"""

import math
from typing import Any

from cruxy_exact._namespace import add_up, cast, is_torch, largest, normal, replaceable, scatter
from cruxy_exact.arithmetic import down, f32, field, mul, power, power64, up
from cruxy_exact.engines import DEFAULT, Precision, multiply

SUM_BITS = 30
"""The bits of the summands of `total`."""
MOST = 2**33
"""How many numbers `total` may add: their integers then fit into int64."""


def quantize(x: Any, axes: int | tuple[int, ...], bits: int, *, xp: Any) -> tuple[Any, Any]:
    """Whole numbers that stand for `x`, and their unit.

    Args:
        x: float32.
        axes: over which the numbers share a unit.
        bits: the whole numbers are at most `2^bits` large; 1 to 30.
        xp: the array namespace.

    Returns:
        `q`, whole numbers in float32, of the shape of `x`; and the unit in float64 with `axes` kept
        as length 1: `x` is nearly `q * unit`, at most half a unit off. The unit is NaN where
        anything over the axes is not finite, and then `q` means nothing. Below `2^(bits-127)` the
        unit no longer shrinks with the numbers.
    """
    e = field(largest(xp.abs(x), axes, xp=xp), xp=xp)
    e = xp.where(e > bits - 1, e, xp.full_like(e, bits - 1))  # a scale that float32 can hold
    q = xp.round(x * power(126 + bits - e, xp=xp))
    unit = power64(e - (126 + bits), xp=xp)
    return q, xp.where(e < 255, unit, xp.full_like(unit, math.nan))


@replaceable
def total(
    x: Any, axes: int | tuple[int, ...] | None = None, *, keepdims: bool = False, xp: Any
) -> Any:
    """The sum over axes, rounded once; at most `n max|x| 2^-30 + 2^-24 |sum|` off.

    Args:
        x: float32, settled.
        axes: what is summed over; all of them where `None`.
        keepdims: keeps the axes with length 1.
        xp: the array namespace.

    Returns:
        float32. NaN where a summand is not finite; 0 where there is none.

    Raises:
        ValueError: where more than `MOST` numbers are to be added.

    Examples:
        >>> import numpy as np
        >>> print(total(np.float32([1e8, 1.0, -1e8]), xp=np))
        1.0
    """
    axes = normal(tuple(range(x.ndim)) if axes is None else axes, x.ndim)
    n = math.prod(x.shape[axis] for axis in axes)
    if n > MOST:
        raise ValueError(f"total adds at most {MOST} numbers, got {n}; sum parts first.")
    if not axes:
        return x
    q, unit = quantize(x, axes, SUM_BITS, xp=xp)
    out = down(up(add_up(cast(q, xp.int32), axes, xp=xp), xp=xp) * unit, xp=xp)
    return out if keepdims else out.reshape([d for i, d in enumerate(x.shape) if i not in axes])


def mean(
    x: Any, axes: int | tuple[int, ...] | None = None, *, keepdims: bool = False, xp: Any
) -> Any:
    """`total` times the float32 reciprocal of the number of summands; arguments as of `total`."""
    axes = normal(tuple(range(x.ndim)) if axes is None else axes, x.ndim)
    n = math.prod(x.shape[axis] for axis in axes)
    if not n:
        raise ValueError("mean needs at least one number, got an empty axis; check the shape.")
    return mul(total(x, axes, keepdims=keepdims, xp=xp), f32(1 / n), xp=xp)


def scatter_add(index: Any, values: Any, rows: int, *, xp: Any) -> Any:
    """Rows added up by their index, as for the gradient of an embedding.

    Columns share a unit, as in `total`.

    Args:
        index: whole numbers from 0 to `rows - 1`; `[n]`.
        values: float32, `[n, D]`.
        rows: of the result.
        xp: the array namespace.

    Returns:
        float32, `[rows, D]`.
    """
    q, unit = quantize(values, 0, SUM_BITS, xp=xp)
    sums = scatter(index, cast(cast(q, xp.int32), xp.int64), rows, xp=xp)
    return down(up(sums, xp=xp) * unit, xp=xp)


@replaceable
def matmul(a: Any, b: Any, *, precision: Precision = DEFAULT, xp: Any) -> Any:
    """The matrix product of `a` and `b`, rounded once from an exact sum.

    The rows of `a` and the columns of `b` are rounded to `precision.bits` bits of their largest. A
    row of the result depends on that row of `a` and on `b` alone: not on what else is in the batch.

    Args:
        a: float32, `[..., M, K]`.
        b: float32, `[..., K, N]`, with the same leading axes, or none.
        precision: bits and engine. The bits are part of the result, the engine is not.
        xp: the array namespace.

    Returns:
        float32, `[..., M, N]`. A row or column with anything that is not finite is NaN, and
        nothing else. The error is at most `2^-bits (alpha_i sum_k |b_kj| + beta_j sum_k |a_ik|) +
        K alpha_i beta_j 2^(-2 bits) + 2^-24 |c_ij|` with the largest `alpha_i` of the row of `a`
        and `beta_j` of the column of `b`.

    Raises:
        ValueError: where the axes do not fit, or `b` has leading axes that `a` has not.
    """
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"matmul needs [..., M, K] and [..., K, N], got {tuple(a.shape)} and {tuple(b.shape)};"
            " reshape or transpose."
        )
    if b.ndim > 2 and tuple(a.shape[:-2]) != tuple(b.shape[:-2]):
        raise ValueError(
            f"matmul needs the same leading axes, got {tuple(a.shape)} and {tuple(b.shape)}; "
            "expand one of them."
        )
    qa, unit_a = quantize(a, -1, precision.bits, xp=xp)
    qb, unit_b = quantize(b, -2, precision.bits, xp=xp)
    return down(multiply(qa, qb, precision, xp=xp) * unit_a * unit_b, xp=xp)


def combine(parts: list[Any], *, xp: Any) -> Any:
    """The sum of arrays of one shape, as `total` over a new first axis."""
    stacked = xp.stack(tuple(parts), dim=0) if is_torch(xp) else xp.stack(tuple(parts), axis=0)
    return total(stacked, 0, xp=xp)
