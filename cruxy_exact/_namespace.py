"""What the three array namespaces spell differently: NumPy, JAX and PyTorch."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def replaceable(function: Function) -> Function:
    """Lets a namespace bring a faster version of a function, which has to give the same bits.

    An `xp` that has an attribute `exact_NAME` is asked for the function `NAME`.
    """
    name = f"exact_{function.__name__}"

    @functools.wraps(function)
    def call(*args: Any, xp: Any, **options: Any) -> Any:
        return getattr(xp, name, function)(*args, xp=xp, **options)

    return call  # pyright: ignore[reportReturnType]


def original(function: Any) -> Any:
    """The version of a `replaceable` function that this package has."""
    return function.__wrapped__


def cast(x: Any, dtype: Any) -> Any:
    """`x` in `dtype`, in any of the namespaces."""
    return x.to(dtype) if hasattr(x, "to") else x.astype(dtype)


def is_torch(xp: Any) -> bool:
    """Whether a namespace is PyTorch's."""
    return xp.__name__ == "torch"


def is_jax(xp: Any) -> bool:
    """Whether a namespace is JAX's, whose operations are compiled together."""
    return xp.__name__ == "jax.numpy"


def largest(x: Any, axes: int | tuple[int, ...], *, xp: Any) -> Any:
    """The maximum over axes, which are kept with length 1; 0 where there is nothing. NaN stays."""
    shape = reduced(x.shape, axes)
    if not math.prod(x.shape):
        return zeros(shape, x.dtype, x, xp=xp)
    if is_torch(xp):
        return xp.amax(x, dim=axes, keepdim=True)
    return xp.max(x, axis=axes, keepdims=True)


def add_up(x: Any, axes: int | tuple[int, ...], *, xp: Any) -> Any:
    """The int64 sum of int32 numbers over axes, which are kept with length 1."""
    if is_torch(xp):
        return xp.sum(x, dim=axes, keepdim=True, dtype=xp.int64)
    return xp.sum(x, axis=axes, keepdims=True, dtype=xp.int64)


def zeros(shape: Sequence[int], dtype: Any, like: Any, *, xp: Any) -> Any:
    """Zeros where `like` lies."""
    if is_torch(xp):
        return xp.zeros(tuple(shape), dtype=dtype, device=like.device)
    return xp.zeros(tuple(shape), dtype=dtype)


def count_up(n: int, like: Any, *, xp: Any) -> Any:
    """`0, 1, ... n - 1` in int32 where `like` lies."""
    if is_torch(xp):
        return xp.arange(n, dtype=xp.int32, device=like.device)
    return xp.arange(n, dtype=xp.int32)


def join(parts: Sequence[Any], axis: int, *, xp: Any) -> Any:
    """Arrays one behind the other along an axis."""
    if is_torch(xp):
        return xp.cat(tuple(parts), dim=axis)
    return xp.concatenate(tuple(parts), axis=axis)


def transposed(x: Any, *, xp: Any) -> Any:
    """The last two axes exchanged."""
    return xp.swapaxes(x, -1, -2)


def pick(x: Any, index: Any, *, xp: Any) -> Any:
    """One element a row: `x` is `[..., V]`, `index` and the result are `[...]`."""
    index = cast(index, xp.int64)[..., None]
    if is_torch(xp):
        return xp.take_along_dim(x, index, dim=-1)[..., 0]
    return xp.take_along_axis(x, index, axis=-1)[..., 0]


def scatter(index: Any, values: Any, rows: int, *, xp: Any) -> Any:
    """Integers added into `rows` rows of zeros: `index` is `[n]`, `values` `[n, D]`, int64."""
    out = zeros((rows, values.shape[-1]), xp.int64, values, xp=xp)
    if is_torch(xp):
        return out.index_add_(0, cast(index, xp.int64), values)
    if hasattr(out, "at"):
        return out.at[index].add(values)
    xp.add.at(out, index, values)
    return out


def pad(x: Any, widths: Sequence[tuple[int, int]], *, xp: Any) -> Any:
    """Zeros before and behind each axis."""
    if is_torch(xp):
        flat = [width for pair in reversed(widths) for width in pair]
        return xp.nn.functional.pad(x, flat)
    return xp.pad(x, tuple(widths))


def reduced(shape: Sequence[int], axes: int | tuple[int, ...]) -> tuple[int, ...]:
    """The shape after a reduction that keeps its axes."""
    gone = normal(axes, len(shape))
    return tuple(1 if i in gone else n for i, n in enumerate(shape))


def normal(axes: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Axes counted from the front."""
    return tuple(axis % ndim for axis in ((axes,) if isinstance(axes, int) else axes))
