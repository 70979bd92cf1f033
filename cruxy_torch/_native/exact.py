"""Exact functions by the C library: which tensors it can take, and how they are handed over.

`Namespace` is PyTorch to `cruxy_exact`, but for the functions that it brings; tensors that are not
plain float32 ones on the CPU, in order and without gaps, go to the reference in `cruxy_exact`.
"""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from cruxy_exact import attention, layers, optimizers, sums
from cruxy_exact._namespace import normal, original
from cruxy_exact.arithmetic import f32
from cruxy_exact.engines import DEFAULT, Precision
from cruxy_torch._native import library

_TYPES = (Tensor, torch.nn.Parameter)
Kept = tuple[Any, ...]


_SIZES = ("batch", "rows", "columns", "along", "bits", "threads")


class _Exact(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        ("inputs", ctypes.c_void_p * 6),
        ("outputs", ctypes.c_void_p * 6),
        ("number", ctypes.c_float * 12),
    )  # fmt: skip


def _is_plain(*tensors: Any) -> bool:
    """Whether all are tensors whose memory the library may read as rows of float32."""
    return all(
        type(x) in _TYPES
        and x.dtype is torch.float32
        and x.is_cpu
        and x.is_contiguous()
        and not x.is_neg()
        and x.numel() > 0
        for x in tensors
    )


def _call(
    name: str,
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    numbers: tuple[float, ...] = (),
    **sizes: int,
) -> None:
    arguments = _Exact(threads=torch.get_num_threads(), **sizes)
    for i, tensor in enumerate(inputs):
        arguments.inputs[i] = tensor.data_ptr()
    for i, tensor in enumerate(outputs):
        arguments.outputs[i] = tensor.data_ptr()
    for i, number in enumerate(numbers):
        arguments.number[i] = number
    library.call(f"cruxy_exact_{name}", arguments)


def _rows(x: Tensor) -> dict[str, Any]:
    return {"rows": x.numel() // x.shape[-1], "columns": x.shape[-1]}


def quantized(x: Tensor, along: int, bits: int) -> tuple[Tensor, Tensor]:
    """`sums.quantize` over the last axis (`along` 1) or the one before, in float64.

    A tensor that is one in order with its last two axes exchanged is read as it lies, and so are
    its whole numbers laid out.
    """
    exchanged = not x.is_contiguous() and x.mT.is_contiguous()
    lying = x.mT if exchanged else x.contiguous()
    q = torch.empty_like(lying, dtype=torch.float64)
    shape = list(x.shape)
    shape[-1 if along else -2] = 1
    unit = torch.empty(shape, dtype=torch.float64, device="cpu")
    _call(
        "quantize",
        (lying,),
        (q, unit),
        batch=math.prod(lying.shape[:-2]),
        rows=lying.shape[-2],
        columns=lying.shape[-1],
        along=along ^ exchanged,
        bits=bits,
    )
    return (q.mT if exchanged else q), unit


class Namespace:
    """PyTorch on CPU with the C library."""

    __name__ = "torch"

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def exact_total(x: Tensor, axes: Any = None, *, keepdims: bool = False, xp: Any) -> Tensor:
        """`sums.total` over the first axes, the last ones, or all of them."""
        over = normal(tuple(range(x.ndim)) if axes is None else axes, x.ndim)
        if not _is_plain(x) or not over:
            return original(sums.total)(x, axes, keepdims=keepdims, xp=torch)
        over = tuple(sorted(over))
        last = over == tuple(range(x.ndim - len(over), x.ndim))
        if not last and over != tuple(range(len(over))):
            return original(sums.total)(x, axes, keepdims=keepdims, xp=torch)
        kept = [1 if i in over else d for i, d in enumerate(x.shape)]
        out = torch.empty(kept, dtype=torch.float32, device="cpu")
        n = math.prod(x.shape[i] for i in over)
        rows, columns = (x.numel() // n, n) if last else (n, x.numel() // n)
        _call("total", (x,), (out,), rows=rows, columns=columns, along=int(last))
        return out if keepdims else out.reshape([d for i, d in enumerate(x.shape) if i not in over])

    @staticmethod
    def exact_matmul(a: Tensor, b: Tensor, *, precision: Precision = DEFAULT, xp: Any) -> Tensor:
        """`sums.matmul` by one float64 product."""
        plain = all(type(x) in _TYPES and x.dtype is torch.float32 and x.is_cpu for x in (a, b))
        fits = plain and precision.engine == "f64" and a.ndim > 1 and b.ndim > 1
        fits = fits and a.shape[-1] == b.shape[-2] and a.shape[-1] <= precision.block
        fits = fits and (b.ndim == 2 or a.shape[:-2] == b.shape[:-2]) and a.numel() * b.numel() > 0
        if not fits or a.is_neg() or b.is_neg():
            return original(sums.matmul)(a, b, precision=precision, xp=torch)
        shape = (*a.shape[:-1], b.shape[-1])
        if b.ndim == 2 and a.ndim > 2:
            a = a.reshape(-1, a.shape[-1])
        (qa, unit_a), (qb, unit_b) = (
            quantized(a, 1, precision.bits),
            quantized(b, 0, precision.bits),
        )
        exact = torch.matmul(qa, qb)
        out = torch.empty(shape, dtype=torch.float32, device="cpu")
        _call(
            "round",
            (exact, unit_a, unit_b),
            (out,),
            batch=math.prod(exact.shape[:-2]),
            rows=exact.shape[-2],
            columns=exact.shape[-1],
        )
        return out

    @staticmethod
    def exact_gelu_forward(x: Tensor, *, xp: Any) -> tuple[Tensor, Kept]:
        """`layers.gelu_forward`."""
        if not _is_plain(x):
            return original(layers.gelu_forward)(x, xp=torch)
        y, square, s = (torch.empty_like(x) for _ in range(3))
        numbers = (layers.GELU_0, layers.GELU_1)
        _call("gelu_forward", (x,), (y, square, s), numbers, columns=x.numel())
        return y, (x, square, s)

    @staticmethod
    def exact_gelu_backward(kept: Kept, g: Tensor, *, xp: Any) -> Kept:
        """`layers.gelu_backward`."""
        g = g.contiguous()
        if not _is_plain(*kept, g):
            return original(layers.gelu_backward)(kept, g, xp=torch)
        dx = torch.empty_like(g)
        numbers = (layers.GELU_0, layers.GELU_3)
        _call("gelu_backward", (*kept, g), (dx,), numbers, columns=g.numel())
        return (dx,)

    @staticmethod
    def exact_layer_norm_forward(
        x: Tensor, w: Tensor, b: Tensor, *, eps: float = 1e-5, xp: Any
    ) -> tuple[Tensor, Kept]:
        """`layers.layer_norm_forward`."""
        if not _is_plain(x, w, b) or not w.shape == b.shape == x.shape[-1:]:
            return original(layers.layer_norm_forward)(x, w, b, eps=eps, xp=torch)
        y, h = torch.empty_like(x), torch.empty_like(x)
        r = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device="cpu")
        numbers = (f32(1 / x.shape[-1]), f32(eps))
        _call("layer_norm_forward", (x, w, b), (y, h, r), numbers, **_rows(x))
        return y, (h, r, w)

    @staticmethod
    def exact_layer_norm_backward(kept: Kept, g: Tensor, *, xp: Any) -> Kept:
        """`layers.layer_norm_backward`."""
        g = g.contiguous()
        if not _is_plain(*kept, g):
            return original(layers.layer_norm_backward)(kept, g, xp=torch)
        dx, settled, gh = (torch.empty_like(g) for _ in range(3))
        numbers = (f32(1 / g.shape[-1]),)
        _call("layer_norm_backward", (*kept, g), (dx, settled, gh), numbers, **_rows(g))
        rows = tuple(range(g.ndim - 1))
        return dx, sums.total(gh, rows, xp=xp), sums.total(settled, rows, xp=xp)

    @staticmethod
    def exact_softmax_forward(z: Tensor, *, xp: Any) -> tuple[Tensor, Kept]:
        """`attention.softmax_forward`."""
        if not _is_plain(z):
            return original(attention.softmax_forward)(z, xp=torch)
        p = torch.empty_like(z)
        _call("softmax_forward", (z,), (p,), **_rows(z))
        return p, (p,)

    @staticmethod
    def exact_softmax_backward(kept: Kept, g: Tensor, *, xp: Any) -> Kept:
        """`attention.softmax_backward`."""
        if not _is_plain(*kept, g):
            return original(attention.softmax_backward)(kept, g, xp=torch)
        dz = torch.empty_like(g)
        _call("softmax_backward", (*kept, g), (dz,), **_rows(g))
        return (dz,)

    @staticmethod
    def exact_cross_entropy_forward(logits: Tensor, labels: Tensor, *, xp: Any) -> Any:
        """`layers.cross_entropy_forward`; labels out of range are an error, as in PyTorch."""
        n = logits.shape[-1]
        if not _is_plain(logits) or logits.shape[:-1] != labels.shape or not labels.is_cpu:
            return original(layers.cross_entropy_forward)(logits, labels, xp=torch)
        whole = labels.to(torch.int64).contiguous()
        if bool(((whole < 0) | (whole >= n)).any()):
            raise IndexError(f"labels must be from 0 to {n - 1}, the classes; mask others out.")
        losses = torch.empty(labels.shape, dtype=torch.float32, device="cpu")
        p = torch.empty_like(logits)
        _call("cross_entropy_forward", (logits, whole), (losses, p), **_rows(logits))
        return losses, (p, labels)

    @staticmethod
    def exact_dropout_forward(x: Tensor, key: Tensor, keep: int, *, xp: Any) -> tuple[Tensor, Kept]:
        """`layers.dropout_forward`."""
        if not _is_plain(x) or not key.is_cpu or not 1 <= keep <= 256 or x.numel() > 2**31:
            return original(layers.dropout_forward)(x, key, keep, xp=torch)
        factor, y = f32(256 / keep), torch.empty_like(x)
        mask = torch.empty(x.shape, dtype=torch.bool, device="cpu")
        sizes: dict[str, Any] = {"columns": x.numel(), "along": keep, "bits": int(key)}
        _call("dropout_forward", (x,), (y, mask), (factor,), **sizes)
        return y, (mask, factor)

    @staticmethod
    def exact_adamw(
        p: Tensor, g: Tensor, m: Tensor, v: Tensor, factors: Any, **options: Any
    ) -> Any:
        """`optimizers.adamw`."""
        out = p.clone(), m.clone(), v.clone()
        if Namespace.adamw_(*out, g, factors, **options):
            return out
        return original(optimizers.adamw)(p, g, m, v, factors, **{**options, "xp": torch})

    @staticmethod
    def adamw_(p: Tensor, m: Tensor, v: Tensor, g: Tensor, factors: Any, **options: Any) -> bool:
        """`optimizers.adamw` in place, where the library can take it; whether it could."""
        names = ("lr", "b1", "b2", "eps", "weight_decay")
        numbers = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01} | options
        plain = all(isinstance(numbers[name], float | int) for name in names)
        shapes = p.shape == g.shape == m.shape == v.shape
        plain = plain and shapes and all(isinstance(factor, float) for factor in factors)
        if not plain or not _is_plain(p, g, m, v):
            return False
        lr, b1, b2, eps, decay = (numbers[name] for name in names)
        decays = (f32(b1), optimizers.rest(b1, xp=torch), f32(b2), optimizers.rest(b2, xp=torch))
        constants = (*factors, *decays, f32(eps), f32(decay), f32(lr))
        _call("adamw", (g,), (p, m, v), constants, columns=p.numel())
        return True


NAMESPACE = Namespace()
