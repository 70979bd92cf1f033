"""Triton kernels for one tensor at a time, for directions that are more than a pass over elements.

What a direction computes of its own stays with torch. What reads or writes every element around it
is fused: the momentum, the squares of a factored second moment, and the move of the parameter.
"""

# What is known at compile time is written as a type, and an `if` of it leaves names unset.
# pyright: reportInvalidTypeForm=false, reportPossiblyUnboundVariable=false, reportMissingImports=false

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cruxy_torch._kept import Coded, Kept, raw
from cruxy_torch._native import fit, triton_found, triton_launch
from cruxy_torch._native.triton_kernels import (
    ROWS,
    TILE,
    constexpr,
    jit,
    keep_moment,
    keep_plain,
    moment,
    places,
    plain,
    random_bits,
    step_along,
    tl,
)
from cruxy_torch._native.triton_launch import OPTIONS, Form
from cruxy_torch._native.triton_tables import constant
from cruxy_torch._orders import Orders

_TYPES = {torch.float32, torch.bfloat16}


@jit
def _moved(
    param, direction, at, left, number, rate_at, key_at, decay,
    P: constexpr, P_CHANCE: constexpr, MASKED: constexpr, ALIGNED: constexpr, ROWS: constexpr,
):  # fmt: skip
    u = plain(direction, at, left, 0, MASKED, ALIGNED, ROWS)
    step_along(
        param, at, left, u, tl.load(rate_at), decay, key_at, number,
        P, P_CHANCE, MASKED, ALIGNED, ROWS,
    )  # fmt: skip


@jit
def move_of_tensor(
    param, direction, numel, number, rate_at, ok_at, key_at, decay_scale_at, decay,
    P: constexpr, P_CHANCE: constexpr, STEERED: constexpr, ALIGNED: constexpr, ROWS: constexpr,
):  # fmt: skip
    """`p <- p - rate (direction + decay p)`, a tile a program; nothing on a skipped step.

    Args:
        param: where it lies.
        direction: where that lies, float32.
        numel: elements of both.
        number: of the first element, for random bits.
        rate_at: 0-d.
        ok_at: whether the step counts.
        key_at: of this step's random bits.
        decay_scale_at: the law's factor on the decay.
        decay: coefficient of the weight decay.
        P: form of the parameter: float32 (0) or bfloat16 (1).
        P_CHANCE: whether it is rounded by chance.
        STEERED: whether the law moves the decay.
        ALIGNED: whether both begin at a multiple of 16 bytes.
        ROWS: blocks in a tile.
    """
    at = tl.program_id(0).to(tl.int64) * (256 * ROWS)
    left = numel - at
    if tl.load(ok_at) != 0:
        if STEERED:
            decay = decay * tl.load(decay_scale_at)
        if left >= 256 * ROWS:
            _moved(
                param, direction, at, left, number, rate_at, key_at, decay,
                P, P_CHANCE, False, ALIGNED, ROWS,
            )  # fmt: skip
        else:
            _moved(
                param, direction, at, left, number, rate_at, key_at, decay,
                P, P_CHANCE, True, ALIGNED, ROWS,
            )  # fmt: skip


@jit
def _averaged(
    grad, first, scales, out, at, left, number, ok, beta1, beta2, scale, key_at,
    G: constexpr, M: constexpr, M_CHANCE: constexpr, M_SHIFT: constexpr, M_TOP: constexpr,
    M_LEAST: constexpr, MASKED: constexpr, ALIGNED: constexpr, ROWS: constexpr,
):  # fmt: skip
    x = tl.where(ok, plain(grad, at, left, G, MASKED, ALIGNED, ROWS), 0.0) * scale
    m = moment(first, scales, at, left, M, True, M_SHIFT, M_TOP, MASKED, ALIGNED, ROWS)
    c = beta1 * m + (1.0 - beta1) * x
    random = places(ROWS)
    keep_plain(out, at, left, c, random, 0, False, MASKED, ALIGNED, ROWS)
    if ok:
        if M_CHANCE:
            random = random_bits(tl.load(key_at), (number + at).to(tl.int32) + places(ROWS))
        m = beta2 * m + (1.0 - beta2) * x
        keep_moment(
            first, scales, at, left, m, random,
            M, M_CHANCE, True, M_SHIFT, M_TOP, M_LEAST, MASKED, ALIGNED, ROWS,
        )  # fmt: skip


@jit
def momentum_of_tensor(
    grad, first, scales, out, numel, number, beta1_at, beta2_at, scale_at, ok_at, key_at,
    G: constexpr, M: constexpr, M_CHANCE: constexpr, M_SHIFT: constexpr, M_TOP: constexpr,
    M_LEAST: constexpr, ALIGNED: constexpr, ROWS: constexpr,
):  # fmt: skip
    """`beta1 m + (1 - beta1) x` of a gradient `x`, and the moment's own step by `beta2`.

    Args:
        grad: where it lies.
        first: where the moment lies.
        scales: where those of a coded moment lie.
        out: float32, for what is asked for.
        numel: elements of each.
        number: of the moment's first element, for random bits.
        beta1_at: this step's orders, see `Orders`, by their addresses.
        beta2_at: likewise.
        scale_at: likewise.
        ok_at: likewise; the gradient counts as 0 where false, and the moment stays.
        key_at: likewise.
        G: form of the gradient.
        M: of the moment; see `moment`.
        M_CHANCE: whether it is rounded by chance.
        M_SHIFT: of its code, as the next two.
        M_TOP: likewise.
        M_LEAST: likewise.
        ALIGNED: whether all but the scales begin at a multiple of 16 bytes.
        ROWS: blocks in a tile.
    """
    at = tl.program_id(0).to(tl.int64) * (256 * ROWS)
    left = numel - at
    ok, scale = tl.load(ok_at) != 0, tl.load(scale_at)
    beta1, beta2 = tl.load(beta1_at), tl.load(beta2_at)
    if left >= 256 * ROWS:
        _averaged(
            grad, first, scales, out, at, left, number, ok, beta1, beta2, scale, key_at,
            G, M, M_CHANCE, M_SHIFT, M_TOP, M_LEAST, False, ALIGNED, ROWS,
        )  # fmt: skip
    else:
        _averaged(
            grad, first, scales, out, at, left, number, ok, beta1, beta2, scale, key_at,
            G, M, M_CHANCE, M_SHIFT, M_TOP, M_LEAST, True, ALIGNED, ROWS,
        )  # fmt: skip


def fits(kept: Kept, grad: Tensor, orders: Orders) -> bool:
    """Whether a tensor can be taken, with a gradient or a direction of its shape."""
    if isinstance(kept, Coded) or not isinstance(orders.ok, Tensor):
        return False
    here = "cpu" if triton_found.interpreted() else "cuda"
    param = raw(kept)
    return (
        triton_found.available(param.device)
        and {type(param), type(grad)} <= {Tensor, torch.nn.Parameter}
        and {param.device, orders.ok.device, orders.rate.device} == {grad.device}
        and grad.device.type == here
        and {param.dtype, grad.dtype} <= _TYPES
        and param.shape == grad.shape
        and param.is_contiguous()
        and grad.is_contiguous()
        and not (param.is_neg() or grad.is_neg())
        and param.numel() > 0
    )


def move(
    kept: Kept, direction: Tensor, rate: Tensor, orders: Orders, decay: float, decay_scale: Any
) -> bool:
    """Moves a parameter along a direction; returns whether it did.

    Args:
        kept: the parameter.
        direction: float32, of its shape.
        rate: 0-d.
        orders: of this step.
        decay: coefficient of the weight decay that is added to the direction.
        decay_scale: the law's factor on it; `None` for none.
    """
    if not fits(kept, direction, orders) or direction.dtype != torch.float32:
        return False
    param, form, steered = raw(kept), Form.of(kept), decay_scale is not None
    where = fit.addresses([param, direction])
    number = fit.first_numbers([kept])[0]
    return started(
        param, move_of_tensor, (-(-param.numel() // TILE),),
        *where, param.numel(), number, rate, orders.ok.view(torch.uint8),
        key_of(orders, param.device), decay_scale if steered else rate, decay,
        P=form.format, P_CHANCE=form.chance, STEERED=steered, ALIGNED=are_aligned(where),
        ROWS=ROWS,
    )  # fmt: skip


def momentum(grad: Tensor, kept: Kept, shape: torch.Size, orders: Orders) -> Tensor | None:
    """`beta1 m + (1 - beta1) x` of a gradient, whose moment takes its step; `None` if not taken.

    Args:
        grad: a raw gradient.
        kept: its moment.
        shape: of both.
        orders: of this step.
    """
    held = raw(kept)
    like = grad if isinstance(kept, Coded) else held
    if not fits(like, grad, orders) or held.device != grad.device or not held.is_contiguous():
        return None
    out, form = torch.empty(shape, dtype=torch.float32, device=grad.device), Form.of(kept)
    scales = kept.scales if isinstance(kept, Coded) else held
    number = 0 if isinstance(kept, Tensor) else kept.first
    where = fit.addresses([grad, held, scales, out])
    taken = started(
        held, momentum_of_tensor, (-(-grad.numel() // TILE),),
        *where, grad.numel(), number,
        orders.beta1, orders.beta2, orders.scale, orders.ok.view(torch.uint8),
        key_of(orders, grad.device),
        G=Form.of(grad).format, M=form.format, M_CHANCE=form.chance, M_SHIFT=form.shift,
        M_TOP=form.top, M_LEAST=form.least,
        ALIGNED=are_aligned([where[0], where[1], where[3]]), ROWS=ROWS,
    )  # fmt: skip
    return out if taken else None


def started(changed: Tensor, kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> bool:
    """Starts a kernel that changes a tensor; false where it failed, and nothing has changed."""
    try:
        triton_launch.launch(changed.device, kernel, grid, *args, **OPTIONS | kwargs)
    except fit.SetAsideError:
        return False
    torch.autograd.graph.increment_version([changed])
    return True


def are_aligned(addresses: Sequence[int]) -> bool:
    """Whether all are multiples of 16."""
    return all(address % 16 == 0 for address in addresses)


def key_of(orders: Orders, device: torch.device) -> Tensor:
    """The key of this step's random bits, where a kernel can read it."""
    if isinstance(orders.key, Tensor):
        return orders.key.to(torch.int32)
    return constant(int(orders.key), device, torch.int32)
