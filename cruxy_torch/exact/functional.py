"""Exact layers as functions with gradients; on float32 tensors, with the same bits everywhere."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cruxy_exact import attention, convolution, layers
from cruxy_torch.exact import _settings


class Exact(torch.autograd.Function):
    """A pair of forward and backward pass from `cruxy_exact`."""

    @staticmethod
    def forward(ctx: Any, pair: Any, rest: tuple, options: dict, *tensors: Tensor | None) -> Any:
        """The forward pass, on the tensors that get gradients, and then on the rest."""
        _check(tensors)
        device = next(t for t in tensors if t is not None).device
        xp = _settings.namespace(device)
        with torch.autocast(device.type, enabled=False):
            out, kept = pair[0](*tensors, *rest, xp=xp, **options)
        ctx.backward_pass, ctx.given = pair[1], [t is not None for t in tensors]
        ctx.places = [i for i, part in enumerate(kept) if torch.is_tensor(part)]
        ctx.static = [None if torch.is_tensor(part) else part for part in kept]
        ctx.save_for_backward(*(kept[i] for i in ctx.places))
        return out

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        """The gradients of the tensors.

        Raises:
            RuntimeError: where they are to be differentiated themselves.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "exact functions must not be differentiated twice, got a backward pass with "
                "create_graph=True; take the second derivative of torch's own functions."
            )
        kept = list(ctx.static)
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            kept[place] = tensor
        device, xp = g[0].device, _settings.namespace(g[0].device)
        with torch.autocast(device.type, enabled=False):
            grads = iter(ctx.backward_pass(tuple(kept), g[0] if len(g) == 1 else g, xp=xp))
        return None, None, None, *(next(grads) if given else None for given in ctx.given)


def _check(tensors: Sequence[Tensor | None]) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(
                f"exact functions take float32 tensors, got {tensor.dtype}; keep parameters and "
                "inputs in float32, without autocast."
            )


def _run(part: Any, name: str, tensors: Sequence[Tensor | None], *rest: Any, **options: Any) -> Any:
    pair = getattr(part, f"{name}_forward"), getattr(part, f"{name}_backward")
    return Exact.apply(pair, rest, options, *tensors)


def _whole(name: str, numbers: Tensor, count: int) -> Tensor:
    """Whole numbers from 0 to `count - 1`; on a GPU, which would have to be waited for, any.

    Raises:
        TypeError: where they are no whole numbers.
        IndexError: where one is out of range.
    """
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise TypeError(f"{name} must be whole numbers, got {numbers.dtype}; use .long().")
    # A traced tensor has no numbers yet.
    if type(numbers) is Tensor and numbers.is_cpu and not torch.compiler.is_compiling():
        low, high = numbers.aminmax() if numbers.numel() else (0, 0)
        if low < 0 or high >= max(count, 1):
            raise IndexError(
                f"{name} must be whole numbers from 0 to {count - 1}, got {int(low)} to "
                f"{int(high)}; leave padded positions out: logits[keep], labels[keep]."
            )
    return numbers


def _precision(tensor: Tensor) -> Any:
    return _settings.precision(tensor.device)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The exact product of `a`, `[..., M, K]`, and `b`, `[..., K, N]`, rounded once.

    Args:
        a: the left factor; its rows are rounded to `use(bits=)` bits of their largest.
        b: the right factor, with the same leading axes; its columns are.

    Raises:
        ValueError: where the axes do not fit.
        TypeError: where one is not float32.
    """
    return _run(layers, "matmul", (a, b), precision=_precision(a))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weight^T + bias`, as `torch.nn.functional.linear`.

    Args:
        x: `[..., K]`.
        weight: `[N, K]`.
        bias: `[N]`.

    Raises:
        TypeError: where one is not float32.
    """
    return _run(layers, "linear", (x, weight.t(), bias), precision=_precision(x))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer normalization over the last axis; `weight` and `bias` are `[D]`."""
    return _run(layers, "layer_norm", (x, weight, bias), eps=eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalization by the root mean square over the last axis; `weight` is `[D]`."""
    return _run(layers, "rms_norm", (x, weight), eps=eps)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Gelu; `approximate="tanh"` for its tanh form, which is quicker.

    Raises:
        ValueError: where `approximate` is neither `"none"` nor `"tanh"`.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}; use 'tanh'.")
    return _run(layers, "gelu" if approximate == "tanh" else "gelu_exact", (x,))


def silu(x: Tensor) -> Tensor:
    """`x sigmoid(x)`."""
    return _run(layers, "silu", (x,))


def relu(x: Tensor) -> Tensor:
    """`x` where it is positive, else 0."""
    return _run(layers, "relu", (x,))


def add(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two tensors of one shape, as of a residual.

    Raises:
        ValueError: where the shapes differ: a sum over an axis that was expanded is none of this
            function's gradients.
    """
    return _run(layers, "add", _alike("add", a, b))


def mul(a: Tensor, b: Tensor) -> Tensor:
    """The product of two tensors of one shape, as of a gate.

    Raises:
        ValueError: where the shapes differ.
    """
    return _run(layers, "mul", _alike("mul", a, b))


def _alike(name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape:
        raise ValueError(
            f"exact.{name} needs one shape, got {tuple(a.shape)} and {tuple(b.shape)}; a bias "
            "belongs into exact.linear, positions into exact.embedding."
        )
    return a, b


def fork(x: Tensor, n: int) -> tuple[Tensor, ...]:
    """`n` copies of a tensor that is used three times or more.

    Autograd adds the gradients of three uses in an order of its own, and the bits of the sum depend
    on it. Those of the copies are added exactly. Two uses need no fork.

    Args:
        x: float32, any shape.
        n: how many, at least 2.

    Raises:
        ValueError: where `n` is below 2.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n!r}; one use needs no fork.")
    return _run(_Fork, "fork", (x,), n)


class _Fork:
    """`layers.fork`, whose copies autograd has to see as different tensors."""

    @staticmethod
    def fork_forward(x: Tensor, n: int, *, xp: Any) -> tuple[tuple[Tensor, ...], tuple]:
        copies, kept = layers.fork_forward(x, n, xp=xp)
        return tuple(copy.view_as(copy) for copy in copies), kept

    fork_backward = staticmethod(layers.fork_backward)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight`, `[V, D]`, by whole numbers; the gradient's rows are added exactly.

    Args:
        ids: whole numbers from 0 to `V - 1`, any shape.
        weight: float32.

    Raises:
        TypeError: where `weight` is not float32, or `ids` are no whole numbers.
        IndexError: where one of them is out of range, on a CPU; a GPU asserts.
    """
    return _run(layers, "embed", (weight,), _whole("ids", ids, weight.shape[0]))


def dropout(x: Tensor, key: Tensor, p: float = 0.5) -> Tensor:
    """Sets elements to 0 by random bits that depend on `key` and their number in `x` alone.

    Args:
        x: float32, any shape.
        key: from `cruxy_exact.stream_key`; int32, `()`.
        p: the share that is dropped, rounded to 256ths; from 0 to 1, without 1.

    Raises:
        ValueError: where `p` is none of these.
    """
    if not 0 <= p < 1:
        raise ValueError(f"p must be in [0, 1), got {p!r}; 0 drops nothing.")
    return _run(layers, "dropout", (x,), key, max(1, round(256 * (1 - p))))


def softmax(x: Tensor) -> Tensor:
    """The softmax over the last axis."""
    return _run(attention, "softmax", (x,))


def sum(x: Tensor) -> Tensor:
    """The sum of all elements, `()`."""
    return _run(layers, "sum", (x,))


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "sum") -> Tensor:
    """Minus the logarithm of the softmax at the label.

    There is no mean: one over a micro-batch would depend on how a batch is cut. Divide the sum of
    all, or the gradients, by the count.

    Args:
        logits: float32, `[..., V]`.
        labels: whole numbers from 0 to `V - 1`, `[...]`.
        reduction: `"sum"`, or `"none"` for one number a label.

    Raises:
        ValueError: where `reduction` is neither.
        TypeError: where `logits` are not float32, or `labels` are no whole numbers.
        IndexError: where a label is out of range, such as a -100 of padding, on a CPU; a GPU
            asserts.
    """
    if reduction not in ("sum", "none"):
        raise ValueError(
            f"reduction must be 'sum' or 'none', got {reduction!r}; divide the sum by the count of "
            "the whole batch."
        )
    labels = _whole("labels", labels, logits.shape[-1])
    losses = _run(layers, "cross_entropy", (logits,), labels)
    return sum(losses) if reduction == "sum" else losses


def scale(x: Tensor, factor: float) -> Tensor:
    """`x` times a number, which is rounded to float32."""
    return _run(layers, "scale", (x,), factor)


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Attention, as in `torch.nn.functional`; fewer heads of `k` and `v` serve queries in groups.

    Args:
        q: `[B, H, T, d]`.
        k: `[B, G, S, d]`, where `G` divides `H`.
        v: `[B, G, S, e]`.
        attn_mask: booleans, true where a query attends; at least one a row.
        is_causal: masks later keys out; the last query sees all.

    Raises:
        ValueError: where the heads do not fit.
        TypeError: where the mask is not boolean.
    """
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        raise TypeError(f"attn_mask must be boolean, got {attn_mask.dtype}; use mask > -1.")
    options = {"causal": is_causal, "precision": _precision(q)}
    return _run(attention, "attention", (q, k, v), attn_mask, **options)


def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions: turns the pairs `(x_i, x_(i + d/2))` of `[..., T, d]`.

    Args:
        x: float32.
        cosine: `[T, d / 2]` of `cruxy_exact.attention.rotary_table`.
        sine: likewise.
    """
    return _run(attention, "rotary", (x,), cosine, sine)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
) -> Tensor:
    """A two-dimensional convolution, as a product of unfolded patches.

    Args:
        x: `[B, C, H, W]`.
        weight: `[N, C, kh, kw]`.
        bias: `[N]`.
        stride: steps between patches.
        padding: zeros on either side.

    Raises:
        ValueError: where the kernel does not fit into the image.
    """
    tensors = (x.permute(0, 2, 3, 1), weight.permute(2, 3, 1, 0), bias)
    options = {"stride": tuple(stride), "padding": tuple(padding), "precision": _precision(x)}
    return _run(convolution, "convolution", tensors, **options).permute(0, 3, 1, 2)
