"""Convolution as a matrix product of unfolded patches. Pairs as in `layers`."""

from typing import Any

from cruxy_exact._namespace import join, pad
from cruxy_exact.arithmetic import add, settle
from cruxy_exact.engines import DEFAULT, Precision
from cruxy_exact.layers import Kept, linear_backward, linear_forward


def unfold(x: Any, kernel: tuple[int, int], stride: tuple[int, int], *, xp: Any) -> Any:
    """The patches of `[B, H, W, C]` as `[B, H', W', kh * kw * C]`."""
    (kh, kw), (sh, sw) = kernel, stride
    rows, columns = _steps(x.shape, kernel, stride)
    parts = [
        x[:, i : i + sh * (rows - 1) + 1 : sh, j : j + sw * (columns - 1) + 1 : sw, :]
        for i in range(kh)
        for j in range(kw)
    ]
    return join(parts, -1, xp=xp)


def fold(
    patches: Any,
    shape: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    *,
    xp: Any,
) -> Any:
    """Patches added up where they lie in `[B, H, W, C]`: the adjoint of `unfold`.

    At most `kh * kw` numbers meet in one place and are added in the order of their offsets.
    """
    (kh, kw), (sh, sw) = kernel, stride
    _, h, w, c = shape
    out = None
    for i in range(kh):
        for j in range(kw):
            at = (i * kw + j) * c
            part = patches[..., at : at + c]
            part = _spread(part, 1, sh, xp=xp)
            part = _spread(part, 2, sw, xp=xp)
            below, right = h - i - part.shape[1], w - j - part.shape[2]
            part = part[:, : min(part.shape[1], h - i), : min(part.shape[2], w - j), :]
            around = [(0, 0), (i, max(below, 0)), (j, max(right, 0)), (0, 0)]
            part = pad(part, around, xp=xp)
            out = part if out is None else add(out, part, xp=xp)
    return out


def _spread(x: Any, axis: int, step: int, *, xp: Any) -> Any:
    """Zeros between the elements along an axis: `step` places for each."""
    if step == 1:
        return x
    shape = list(x.shape)
    x = x.reshape(*shape[: axis + 1], 1, *shape[axis + 1 :])
    x = pad(x, [(0, step - 1) if i == axis + 1 else (0, 0) for i in range(x.ndim)], xp=xp)
    shape[axis] *= step
    return x.reshape(*shape)


def _steps(
    shape: tuple[int, ...], kernel: tuple[int, int], stride: tuple[int, int]
) -> tuple[int, int]:
    rows, columns = ((shape[1 + i] - kernel[i]) // stride[i] + 1 for i in range(2))
    if rows < 1 or columns < 1:
        raise ValueError(
            f"the kernel {kernel} must fit into the image {tuple(shape[1:3])}; pad the image."
        )
    return rows, columns


def convolution_forward(
    x: Any,
    w: Any,
    b: Any = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    precision: Precision = DEFAULT,
    xp: Any,
) -> tuple[Any, Kept]:
    """A two-dimensional convolution; with stride and kernel alike a patch embedding.

    Args:
        x: float32, `[B, H, W, C]`.
        w: float32, `[kh, kw, C, N]`.
        b: float32, `[N]`, or `None`.
        stride: steps between patches.
        padding: zeros on either side of both axes.
        precision: of the product.
        xp: the array namespace.

    Returns:
        float32, `[B, H', W', N]`, and what the backward pass needs.

    Raises:
        ValueError: where the kernel does not fit into the image.
    """
    kernel = (w.shape[0], w.shape[1])
    wide = x
    if any(padding):
        top, left = padding
        wide = pad(x, [(0, 0), (top, top), (left, left), (0, 0)], xp=xp)
    patches = unfold(wide, kernel, stride, xp=xp)
    flat = w.reshape(-1, w.shape[-1])
    y, kept = linear_forward(patches, flat, b, precision=precision, xp=xp)
    return y, (*kept, tuple(wide.shape), tuple(w.shape), tuple(stride), tuple(padding))


def convolution_backward(kept: Kept, g: Any, *, xp: Any) -> Kept:
    """The gradients of `x` and `w`, and of `b` where there is one."""
    *linear, shape, weights, stride, (top, left) = kept
    dx, dw, *db = linear_backward(tuple(linear), settle(g, xp=xp), xp=xp)
    dx = fold(dx, shape, weights[:2], stride, xp=xp)
    dx = dx[:, top : shape[1] - top, left : shape[2] - left, :]
    return (dx, dw.reshape(weights), *db)
