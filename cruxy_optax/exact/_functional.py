"""Exact layers as differentiable functions of float32 arrays."""

from typing import Any

import jax
import jax.numpy as jnp

from cruxy_exact import convolution as core
from cruxy_exact import layers
from cruxy_exact.engines import DEFAULT, Precision
from cruxy_exact.random_bits import stream_key
from cruxy_optax.exact._frame import frame, tested
from cruxy_optax.exact._pairs import run


def matmul(a: Any, b: Any, *, precision: Precision = DEFAULT) -> jax.Array:
    """The matrix product, rounded once from an exact sum.

    Args:
        a: float32, `[..., M, K]`; its rows are rounded to `precision.bits` bits of their largest.
        b: float32, `[..., K, N]`, with the same leading axes; its columns are.
        precision: bits, which are part of the result, and the engine, which is not.

    Returns:
        float32, `[..., M, N]`.

    Raises:
        ValueError: where the axes do not fit.
        TypeError: where an array is not float32.
    """
    return run(layers, "matmul", (a, b), precision=tested(precision))


def linear(x: Any, w: Any, b: Any = None, *, precision: Precision = DEFAULT) -> jax.Array:
    """`x w + b`.

    A row of the result depends on that row of `x`, on `w` and on `b` alone, whatever else is in the
    batch.

    Args:
        x: float32, `[..., K]`.
        w: float32, `[K, N]`.
        b: float32, `[N]`, or `None`.
        precision: see `matmul`.

    Returns:
        float32, `[..., N]`.

    Raises:
        ValueError: where the axes do not fit.
        TypeError: where an array is not float32.

    Examples:
        >>> import jax.numpy as jnp
        >>> from cruxy_optax import exact
        >>> print(exact.linear(jnp.ones((1, 3)), jnp.full((3, 2), 0.5), jnp.array([0.0, 1.0])))
        [[1.5 2.5]]
    """
    return run(layers, "linear", (x, w, b), precision=tested(precision))


def layer_norm(x: Any, w: Any, b: Any, *, eps: float = 1e-5) -> jax.Array:
    """Layer normalization over the last axis.

    Args:
        x: float32, `[..., D]`.
        w: float32, `[D]`.
        b: float32, `[D]`.
        eps: added to the variance; 1e-5 as in PyTorch, where Flax has 1e-6.

    Raises:
        TypeError: where an array is not float32.
    """
    return run(layers, "layer_norm", (x, w, b), eps=eps)


def rms_norm(x: Any, w: Any, *, eps: float = 1e-6) -> jax.Array:
    """Normalization by the root mean square over the last axis.

    Args:
        x: float32, `[..., D]`.
        w: float32, `[D]`.
        eps: added to the mean square.

    Raises:
        TypeError: where an array is not float32.
    """
    return run(layers, "rms_norm", (x, w), eps=eps)


def gelu(x: Any, approximate: bool = True) -> jax.Array:
    """Gelu, as `jax.nn.gelu`: in its tanh form, or by the error function.

    Args:
        x: float32, any shape.
        approximate: whether it is the tanh form, which is quicker.

    Raises:
        TypeError: where `x` is not float32.
    """
    return run(layers, "gelu" if approximate else "gelu_exact", (x,))


def silu(x: Any) -> jax.Array:
    """`x sigmoid(x)`; float32, any shape."""
    return run(layers, "silu", (x,))


def relu(x: Any) -> jax.Array:
    """`x` where it is positive, else 0; float32, any shape."""
    return run(layers, "relu", (x,))


def add(a: Any, b: Any) -> jax.Array:
    """The sum of two arrays of one shape, as of a residual.

    Raises:
        ValueError: where the shapes differ: the sum over an axis that was stretched would be none
            of this function's gradients.
        TypeError: where one is not float32.
    """
    return run(layers, "add", _alike("add", a, b))


def mul(a: Any, b: Any) -> jax.Array:
    """The product of two arrays of one shape, as of a gate. It raises as `add` does."""
    return run(layers, "mul", _alike("mul", a, b))


def _alike(name: str, a: Any, b: Any) -> tuple[Any, Any]:
    if jnp.shape(a) != jnp.shape(b):
        raise ValueError(
            f"exact.{name} needs one shape, got {jnp.shape(a)} and {jnp.shape(b)}; a bias belongs "
            "into exact.linear, positions into exact.embed."
        )
    return a, b


def scale(x: Any, factor: float) -> jax.Array:
    """`x` times a Python number, which is rounded to float32."""
    return run(layers, "scale", (x,), fixed=(float(factor),))


def sum(x: Any) -> jax.Array:
    """The sum of all elements, rounded once; float32, `()`.

    Raises:
        TypeError: where `x` is not float32.

    Examples:
        >>> import jax.numpy as jnp
        >>> from cruxy_optax import exact
        >>> print(exact.sum(jnp.array([1e8, 1.0, -1e8])))
        1.0
    """
    return run(layers, "sum", (x,))


def mean(x: Any) -> jax.Array:
    """The sum of all elements times the float32 reciprocal of their number.

    Raises:
        ValueError: where there is none.
        TypeError: where `x` is not float32.
    """
    if not jnp.size(x):
        raise ValueError(f"mean needs at least one number, got the shape {jnp.shape(x)}.")
    return scale(sum(x), 1.0 / jnp.size(x))


def fork(x: Any, n: int) -> tuple[jax.Array, ...]:
    """`n` copies of an array that is used three times or more, whose gradients are added exactly.

    Without it they are added one by one, and the sum depends on the order in which a framework
    does. Two uses need no fork.

    Args:
        x: float32, any shape.
        n: how many, at least 2.

    Raises:
        ValueError: where `n` is below 2.
        TypeError: where `x` is not float32.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n!r}; one use needs no fork.")
    return run(layers, "fork", (x,), fixed=(n,))


def embed(w: Any, ids: Any) -> jax.Array:
    """Rows of a table; the gradients of a row are added exactly.

    Args:
        w: float32, `[V, D]`.
        ids: whole numbers from 0 to `V - 1`, any shape.

    Returns:
        float32, `[..., D]`.

    Raises:
        TypeError: where `w` is not float32 or `ids` are no whole numbers.
    """
    return run(layers, "embed", (w,), (_whole("ids", ids),))


def dropout_key(step: Any, layer: int, *, seed: int = 0, grain: Any = 0) -> jax.Array:
    """The key of one dropout's random bits in one step, the same as in PyTorch.

    Args:
        step: its number; an int or an int32 array `()`.
        layer: tells the dropouts of a model apart, from 0. A grain takes sixty-four numbers: the
            65th dropout of a model takes `cruxy_exact.random_bits.layer_number(64)`.
        seed: tells runs apart.
        grain: the number of the grain in the whole batch, where gradients are accumulated; an int
            or an int32 array `()`.

    Returns:
        int32, `()`.
    """
    with frame():
        leaf = grain if isinstance(grain, int) else jnp.asarray(grain, jnp.int32)
        return stream_key(jnp.asarray(step, jnp.int32), seed, layer + 64 * leaf, xp=jnp)


def dropout(x: Any, key: Any, rate: float = 0.5) -> jax.Array:
    """Sets elements to 0 by random bits that depend on `key` and their number in `x` alone.

    Shards of an array have the mask of the whole.

    Args:
        x: float32, any shape.
        key: from `dropout_key`.
        rate: the share that is dropped, rounded to 256ths; in `[0, 1)`.

    Raises:
        ValueError: where `rate` is none of these.
        TypeError: where `x` is not float32 or `key` is no int32.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be in [0, 1), got {rate!r}; 0 drops nothing.")
    key = jnp.asarray(key)
    if key.dtype != jnp.int32:
        raise TypeError(f"key must be an int32 array, got {key.dtype}; use exact.dropout_key.")
    return run(layers, "dropout", (x,), (key,), fixed=(max(1, round(256 * (1 - rate))),))


def softmax_cross_entropy_with_integer_labels(logits: Any, labels: Any) -> jax.Array:
    """Minus the logarithm of the softmax at the label, one number a row, as in optax.

    Take `exact.sum` of it, and divide by the count of the whole batch at the end: a mean over a
    micro-batch would depend on how the batch is cut.

    Args:
        logits: float32, `[..., V]`.
        labels: whole numbers from 0 to `V - 1`, `[...]`.

    Returns:
        float32, `[...]`; NaN where a label is out of range, such as a -100 of padding.

    Raises:
        TypeError: where `logits` are not float32 or `labels` are no whole numbers.
    """
    labels = _whole("labels", labels)
    # What is negative would count from the end.
    labels = jnp.where(labels < 0, jnp.shape(logits)[-1], labels)
    return run(layers, "cross_entropy", (logits,), (labels,))


def _whole(name: str, x: Any) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be whole numbers, got {x.dtype}; use int32.")
    return x


def convolution(
    x: Any,
    w: Any,
    b: Any = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    precision: Precision = DEFAULT,
) -> jax.Array:
    """A two-dimensional convolution, as a product of unfolded patches.

    Args:
        x: float32, `[B, H, W, C]`.
        w: float32, `[kh, kw, C, N]`.
        b: float32, `[N]`, or `None`.
        stride: steps between patches.
        padding: zeros on either side of both axes.
        precision: see `matmul`.

    Returns:
        float32, `[B, H', W', N]`.

    Raises:
        ValueError: where the kernel does not fit into the image.
        TypeError: where an array is not float32.
    """
    options = {"stride": tuple(stride), "padding": tuple(padding), "precision": tested(precision)}
    return run(core, "convolution", (x, w, b), **options)


def patch_embedding(x: Any, w: Any, b: Any = None, *, precision: Precision = DEFAULT) -> jax.Array:
    """The patches of images as rows: a convolution whose stride is its kernel.

    Args:
        x: float32, `[B, H, W, C]`.
        w: float32, `[kh, kw, C, N]`.
        b: float32, `[N]`, or `None`.
        precision: see `matmul`.

    Returns:
        float32, `[B, H / kh * W / kw, N]`.

    Raises:
        ValueError: where the patches do not fill the image.
        TypeError: where an array is not float32.
    """
    (height, width), kernel = jnp.shape(x)[1:3], (jnp.shape(w)[0], jnp.shape(w)[1])
    if height % kernel[0] or width % kernel[1]:
        raise ValueError(
            f"patches must fill the image, got {kernel} for {(height, width)}; pad or crop it."
        )
    y = convolution(x, w, b, stride=kernel, precision=precision)
    return y.reshape(y.shape[0], -1, y.shape[-1])
