"""Triton kernels for a matrix whose second moment is factored: its squares, sizes and move."""

# What is known at compile time is written as a type, and an `if` of it leaves names unset.
# pyright: reportInvalidTypeForm=false, reportPossiblyUnboundVariable=false, reportMissingImports=false

from typing import Any

import torch
from torch import Tensor

from cruxy_torch._kept import Kept, raw
from cruxy_torch._native import fit, triton_launch
from cruxy_torch._native.triton_kernels import (
    ROWS,
    TILE,
    constexpr,
    jit,
    places,
    plain,
    step_along,
    tl,
)
from cruxy_torch._native.triton_launch import OPTIONS, Form
from cruxy_torch._native.triton_tensors import are_aligned, fits, key_of, started
from cruxy_torch._orders import Orders

HEIGHT, WIDTH = 32, 128
"""Rows and columns of a tile."""


@jit
def _tile(rows, columns, HEIGHT: constexpr, WIDTH: constexpr):
    """Rows and columns of this program's tile of a matrix, and which of its elements there are."""
    row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    return row, column, inside


@jit
def _element(pointer, row, column, columns, inside, FORMAT: constexpr):
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    value = tl.load(pointer + place, mask=inside, other=0)
    if FORMAT == 1:
        return (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return value


@jit
def squares_of_matrix(
    grad, rows, columns, scale_at, ok_at, by_row, by_column,
    G: constexpr, HEIGHT: constexpr, WIDTH: constexpr,
):  # fmt: skip
    """Sums of the squares of a gradient over each row and each column of a tile.

    Args:
        grad: a matrix, row by row.
        rows: of it.
        columns: of it.
        scale_at: factor on the gradient.
        ok_at: whether the step counts; else the gradient is 0.
        by_row: `(tiles side by side, rows)`, float32.
        by_column: `(tiles one under the other, columns)`, float32.
        G: form of the gradient: float32 (0), or bfloat16 (1) as int16.
        HEIGHT: rows of a tile.
        WIDTH: columns of a tile.
    """
    row, column, _ = _tile(rows, columns, HEIGHT, WIDTH)
    _, _, inside = _tile(tl.where(tl.load(ok_at) != 0, rows, 0), columns, HEIGHT, WIDTH)
    x = _element(grad, row, column, columns, inside, G) * tl.load(scale_at)
    square = tl.where(inside, x * x, 0.0)
    place = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(by_row + place, tl.sum(square, axis=1), mask=row < rows)
    place = tl.program_id(0).to(tl.int64) * columns + column
    tl.store(by_column + place, tl.sum(square, axis=0), mask=column < columns)


@jit
def sizes_of_matrix(
    grad, param, first, second, rows, columns, scale_at, ok_at, out,
    G: constexpr, P: constexpr, TURNED: constexpr, HEIGHT: constexpr, WIDTH: constexpr,
):  # fmt: skip
    """The sums of `u^2` and of `p^2` over each tile, with `u` the gradient times both factors.

    Args:
        grad: a matrix, row by row.
        param: likewise.
        first: the factors along one axis.
        second: along the other.
        rows: of the matrix.
        columns: of it.
        scale_at: factor on the gradient.
        ok_at: whether the step counts; else the gradient is 0.
        out: `(2, tiles)`, float32.
        G: form of the gradient, see `squares_of_matrix`.
        P: of the parameter.
        TURNED: whether `first` belongs to the columns.
        HEIGHT: rows of a tile.
        WIDTH: columns of a tile.
    """
    row, column, inside = _tile(rows, columns, HEIGHT, WIDTH)
    _, _, counts = _tile(tl.where(tl.load(ok_at) != 0, rows, 0), columns, HEIGHT, WIDTH)
    u = _element(grad, row, column, columns, counts, G) * tl.load(scale_at)
    if TURNED:
        u = u * tl.load(first + column, mask=column < columns, other=0.0)[None, :]
        u = u * tl.load(second + row, mask=row < rows, other=0.0)[:, None]
    else:
        u = u * tl.load(first + row, mask=row < rows, other=0.0)[:, None]
        u = u * tl.load(second + column, mask=column < columns, other=0.0)[None, :]
    p = _element(param, row, column, columns, inside, P)
    tiles = tl.num_programs(0) * tl.num_programs(1)
    at = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(out + at, tl.sum(tl.sum(tl.where(counts, u * u, 0.0), axis=1), axis=0))
    tl.store(out + tiles + at, tl.sum(tl.sum(p * p, axis=1), axis=0))


@jit
def _moved(
    grad, param, first, second, at, left, columns, number, scale, clip, size_at, rate, key_at,
    decay,
    G: constexpr, P: constexpr, P_CHANCE: constexpr, TURNED: constexpr, SIZED: constexpr,
    MASKED: constexpr, ALIGNED: constexpr, ROWS: constexpr,
):  # fmt: skip
    x = plain(grad, at, left, G, MASKED, ALIGNED, ROWS) * scale
    inside = places(ROWS) < left
    index = at + places(ROWS)
    row, column = index // columns, index % columns
    if TURNED:
        u = x * tl.load(first + column, mask=inside, other=0.0)
        u = u * tl.load(second + row, mask=inside, other=0.0)
    else:
        u = x * tl.load(first + row, mask=inside, other=0.0)
        u = u * tl.load(second + column, mask=inside, other=0.0)
    u = u * clip
    if SIZED:
        u = u * tl.load(size_at)
    step_along(param, at, left, u, rate, decay, key_at, number, P, P_CHANCE, MASKED, ALIGNED, ROWS)


@jit
def move_of_matrix(
    grad, param, first, second, numel, columns, number, scale_at, clip_at, size_at, rate_at, ok_at,
    key_at, decay_scale_at, decay,
    G: constexpr, P: constexpr, P_CHANCE: constexpr, TURNED: constexpr, SIZED: constexpr,
    STEERED: constexpr, ALIGNED: constexpr, ROWS: constexpr,
):  # fmt: skip
    """`move_of_tensor` along `u clip size`, see `sizes_of_matrix`.

    Args:
        grad: where it lies.
        param: likewise.
        first: the factors along one axis.
        second: along the other.
        numel: elements of the matrix.
        columns: of it.
        number: see `move_of_tensor`.
        scale_at: factor on the gradient.
        clip_at: factor on `u`.
        size_at: another.
        rate_at: see `move_of_tensor`, as the next four.
        ok_at: likewise.
        key_at: likewise.
        decay_scale_at: likewise.
        decay: likewise.
        G: form of the gradient: float32 (0) or bfloat16 (1).
        P: of the parameter.
        P_CHANCE: whether it is rounded by chance.
        TURNED: whether `first` belongs to the columns.
        SIZED: whether there is a size.
        STEERED: whether the law moves the decay.
        ALIGNED: whether both begin at a multiple of 16 bytes.
        ROWS: blocks in a tile.
    """
    at = tl.program_id(0).to(tl.int64) * (256 * ROWS)
    left = numel - at
    if tl.load(ok_at) != 0:
        if STEERED:
            decay = decay * tl.load(decay_scale_at)
        scale, clip, rate = tl.load(scale_at), tl.load(clip_at), tl.load(rate_at)
        if left >= 256 * ROWS:
            _moved(
                grad, param, first, second, at, left, columns, number, scale, clip, size_at, rate,
                key_at, decay, G, P, P_CHANCE, TURNED, SIZED, False, ALIGNED, ROWS,
            )  # fmt: skip
        else:
            _moved(
                grad, param, first, second, at, left, columns, number, scale, clip, size_at, rate,
                key_at, decay, G, P, P_CHANCE, TURNED, SIZED, True, ALIGNED, ROWS,
            )  # fmt: skip


class Matrix:
    """A gradient and its parameter, for a direction over a factored second moment.

    Args:
        kept: the parameter.
        grad: its raw gradient.
        orders: of this step.
    """

    def __init__(self, kept: Kept, grad: Tensor, orders: Orders) -> None:
        self._kept, self._orders = kept, orders
        self._param, self._raw = raw(kept), grad
        self._ok = orders.ok.view(torch.uint8)
        self._shape = tuple(grad.shape)
        self._tiles = -(-self._shape[0] // HEIGHT), -(-self._shape[1] // WIDTH)
        self._forms = {"G": Form.of(grad).format, "P": Form.of(kept).format}

    def square_sums(self) -> dict[int, Tensor]:
        """By axis the sums of the gradient's squares along it, which is kept with one element."""
        (rows, columns), (down, across) = self._shape, self._tiles
        by_row, by_column = self._empty(across, rows), self._empty(down, columns)
        triton_launch.launch(
            self._raw.device, squares_of_matrix, self._tiles,
            _bits(self._raw), rows, columns, self._orders.scale, self._ok, by_row, by_column,
            G=self._forms["G"], HEIGHT=HEIGHT, WIDTH=WIDTH, **OPTIONS,
        )  # fmt: skip
        return {1: by_row.sum(0)[:, None], 0: by_column.sum(0)[None, :]}

    def sizes(self, factors: tuple[Tensor, Tensor]) -> Tensor:
        """The sums of the squares of the normalised gradient and of the parameter; `(2,)`."""
        out = self._empty(2, self._tiles[0] * self._tiles[1])
        triton_launch.launch(
            self._raw.device, sizes_of_matrix, self._tiles,
            _bits(self._raw), _bits(self._param), *map(_flat, factors), *self._shape,
            self._orders.scale, self._ok, out,
            **self._forms, TURNED=_turned(factors), HEIGHT=HEIGHT, WIDTH=WIDTH, **OPTIONS,
        )  # fmt: skip
        return out.sum(1)

    def move(
        self, factors: tuple[Tensor, Tensor], clip: Tensor, size: Tensor | None, rate: Tensor,
        decay: float, decay_scale: Any,
    ) -> None:  # fmt: skip
        """Moves the parameter along the normalised gradient times two numbers."""
        form, steered = Form.of(self._kept), decay_scale is not None
        where = fit.addresses([self._raw, self._param])
        launched = started(
            self._param, move_of_matrix, (-(-self._param.numel() // TILE),),
            *where, *map(_flat, factors), self._param.numel(),
            self._shape[1], fit.first_numbers([self._kept])[0], self._orders.scale, clip,
            clip if size is None else size, rate, self._ok, key_of(self._orders, rate.device),
            decay_scale if steered else rate, decay,
            **self._forms, P_CHANCE=form.chance, TURNED=_turned(factors), SIZED=size is not None,
            STEERED=steered, ALIGNED=are_aligned(where), ROWS=ROWS,
        )  # fmt: skip
        if not launched:
            raise fit.SetAsideError("a kernel of a matrix failed")

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self._raw.device)


def matrix(kept: Kept, grad: Tensor, orders: Orders) -> Matrix | None:
    """A gradient and its parameter; `None` where they cannot be taken."""
    return Matrix(kept, grad, orders) if grad.ndim == 2 and fits(kept, grad, orders) else None


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _flat(factor: Tensor) -> Tensor:
    return factor.reshape(-1)


def _turned(factors: tuple[Tensor, Tensor]) -> bool:
    return factors[0].shape[0] == 1 and factors[0].shape[1] > 1
