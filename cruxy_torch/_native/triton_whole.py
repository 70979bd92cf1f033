"""Triton kernels for the whole step of one tensor whose factors are its own, as COSMIC's are."""

# What is known at compile time is written as a type, and an `if` of it leaves names unset.
# pyright: reportInvalidTypeForm=false, reportPossiblyUnboundVariable=false, reportMissingImports=false

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cruxy_torch._kept import Coded, Kept, raw
from cruxy_torch._native import fit
from cruxy_torch._native.triton_kernels import (
    ROWS,
    TILE,
    constexpr,
    jit,
    plain,
    step_along,
    tl,
)
from cruxy_torch._native.triton_launch import UPDATE_OPTIONS, Form
from cruxy_torch._native.triton_steps import moved
from cruxy_torch._native.triton_tensors import are_aligned, fits, key_of, started
from cruxy_torch._orders import Orders


@jit
def adam_of_tensor(
    param, grad, first, first_scales, second, second_scales, numel, first_number, number,
    rate_at, beta1_at, beta2_at, scale_at, ok_at, key_at, gain_at, spread_at, eps_at,
    decay_scale_at, decay,
    P: constexpr, P_CHANCE: constexpr, G: constexpr,
    M: constexpr, M_CHANCE: constexpr, M_SHIFT: constexpr, M_TOP: constexpr, M_LEAST: constexpr,
    V: constexpr, V_CHANCE: constexpr, V_SHIFT: constexpr, V_TOP: constexpr, V_LEAST: constexpr,
    NESTEROV: constexpr, STEERED: constexpr, ALIGNED: constexpr, ROWS: constexpr,
):  # fmt: skip
    """One step of Adam whose factors are known, a tile a program; nothing on a skipped step.

    Args:
        param: where it lies.
        grad: likewise.
        first: likewise, the first moment.
        first_scales: likewise, those of a coded one.
        second: likewise, the second moment.
        second_scales: likewise.
        numel: elements of each.
        first_number: of the moments' first element, for random bits.
        number: of the parameter's.
        rate_at: 0-d.
        beta1_at: this step's orders, see `Orders`, by their addresses.
        beta2_at: likewise.
        scale_at: likewise.
        ok_at: likewise.
        key_at: likewise.
        gain_at: factor on the numerator.
        spread_at: factor on the second moment.
        eps_at: added to the root.
        decay_scale_at: the law's factor on the decay.
        decay: coefficient of the weight decay.
        P: see `triton_steps.update_of_chunks`, as all others.
        P_CHANCE: likewise.
        G: likewise.
        M: likewise.
        M_CHANCE: likewise.
        M_SHIFT: likewise.
        M_TOP: likewise.
        M_LEAST: likewise.
        V: likewise.
        V_CHANCE: likewise.
        V_SHIFT: likewise.
        V_TOP: likewise.
        V_LEAST: likewise.
        NESTEROV: likewise.
        STEERED: likewise.
        ALIGNED: likewise.
        ROWS: likewise.
    """
    at = tl.program_id(0).to(tl.int64) * (256 * ROWS)
    left = numel - at
    if tl.load(ok_at) != 0:
        if STEERED:
            decay = decay * tl.load(decay_scale_at)
        rate, scale, key = tl.load(rate_at), tl.load(scale_at), tl.load(key_at)
        beta1, beta2 = tl.load(beta1_at), tl.load(beta2_at)
        gain, spread, eps = tl.load(gain_at), tl.load(spread_at), tl.load(eps_at)
        if left >= 256 * ROWS:
            moved(
                param, grad, first, first_scales, second, second_scales, param, at, left,
                first_number, number, rate, beta1, beta2, scale, key, 0.0, 0.0, decay, eps,
                gain, spread, P, P_CHANCE, G, M, M_CHANCE, M_SHIFT, M_TOP, M_LEAST,
                V, V_CHANCE, V_SHIFT, V_TOP, V_LEAST, NESTEROV, False, False,
                False, False, ALIGNED, ROWS,
            )  # fmt: skip
        else:
            moved(
                param, grad, first, first_scales, second, second_scales, param, at, left,
                first_number, number, rate, beta1, beta2, scale, key, 0.0, 0.0, decay, eps,
                gain, spread, P, P_CHANCE, G, M, M_CHANCE, M_SHIFT, M_TOP, M_LEAST,
                V, V_CHANCE, V_SHIFT, V_TOP, V_LEAST, NESTEROV, False, False,
                False, True, ALIGNED, ROWS,
            )  # fmt: skip


@jit
def _signed(
    param, grad, at, left, number, rate, scale, size, key_at, decay,
    P: constexpr, P_CHANCE: constexpr, G: constexpr, MASKED: constexpr, ALIGNED: constexpr,
    ROWS: constexpr,
):  # fmt: skip
    x = plain(grad, at, left, G, MASKED, ALIGNED, ROWS) * scale
    u = ((x > 0.0).to(tl.float32) - (x < 0.0).to(tl.float32)) * size
    step_along(param, at, left, u, rate, decay, key_at, number, P, P_CHANCE, MASKED, ALIGNED, ROWS)


@jit
def sign_of_tensor(
    param, grad, numel, number, rate_at, scale_at, size_at, ok_at, key_at, decay_scale_at, decay,
    P: constexpr, P_CHANCE: constexpr, G: constexpr, STEERED: constexpr, ALIGNED: constexpr,
    ROWS: constexpr,
):  # fmt: skip
    """A step along the sign of the gradient times a size; arguments as of `adam_of_tensor`."""
    at = tl.program_id(0).to(tl.int64) * (256 * ROWS)
    left = numel - at
    if tl.load(ok_at) != 0:
        if STEERED:
            decay = decay * tl.load(decay_scale_at)
        scale, rate, size = tl.load(scale_at), tl.load(rate_at), tl.load(size_at)
        if left >= 256 * ROWS:
            _signed(
                param, grad, at, left, number, rate, scale, size, key_at, decay,
                P, P_CHANCE, G, False, ALIGNED, ROWS,
            )  # fmt: skip
        else:
            _signed(
                param, grad, at, left, number, rate, scale, size, key_at, decay,
                P, P_CHANCE, G, True, ALIGNED, ROWS,
            )  # fmt: skip


def adam(
    kept: Kept,
    grad: Tensor,
    moments: Sequence[Kept],
    factors: Sequence[Tensor],
    rate: Tensor,
    orders: Orders,
    *,
    nesterov: bool,
    decay: tuple[float, Any],
) -> bool:
    """One step of Adam of one tensor; returns whether it was done.

    Args:
        kept: the parameter.
        grad: its raw gradient.
        moments: the first and the second.
        factors: on the numerator and on the second moment, and what is added to the root; 0-d.
        rate: 0-d.
        orders: of this step.
        nesterov: looks one step ahead.
        decay: coefficient of the weight decay, and the law's factor on it.
    """
    plains = [raw(m) for m in moments if not isinstance(m, Coded)]
    if not all(fits(m, grad, orders) for m in (kept, *plains)):
        return False
    first, second = moments
    held = [raw(m) for m in moments]
    scales = [m.scales if isinstance(m, Coded) else raw(m) for m in moments]
    where = fit.addresses([raw(kept), grad, held[0], scales[0], held[1], scales[1]])
    return started(
        raw(kept), adam_of_tensor, (-(-grad.numel() // TILE),),
        *where, grad.numel(), fit.first_numbers([first])[0], fit.first_numbers([kept])[0],
        rate, orders.beta1, orders.beta2, orders.scale, orders.ok.view(torch.uint8),
        key_of(orders, grad.device), *factors, rate if decay[1] is None else decay[1], decay[0],
        P=Form.of(kept).format, P_CHANCE=Form.of(kept).chance, G=Form.of(grad).format,
        **Form.of(first).named("M"), **Form.of(second).named("V"), NESTEROV=nesterov,
        STEERED=decay[1] is not None, ALIGNED=are_aligned([*where[:3], where[4]]), ROWS=ROWS,
        **UPDATE_OPTIONS,
    )  # fmt: skip


def sign(
    kept: Kept,
    grad: Tensor,
    size: Tensor,
    rate: Tensor,
    orders: Orders,
    *,
    decay: tuple[float, Any],
) -> bool:
    """A step of one tensor along its gradient's sign, times a size; see `adam`."""
    if not fits(kept, grad, orders) or size.device != grad.device:
        return False
    where, form = fit.addresses([raw(kept), grad]), Form.of(kept)
    return started(
        raw(kept), sign_of_tensor, (-(-grad.numel() // TILE),),
        *where, grad.numel(), fit.first_numbers([kept])[0], rate, orders.scale, size,
        orders.ok.view(torch.uint8), key_of(orders, grad.device),
        rate if decay[1] is None else decay[1], decay[0],
        P=form.format, P_CHANCE=form.chance, G=Form.of(grad).format,
        STEERED=decay[1] is not None, ALIGNED=are_aligned(where), ROWS=ROWS,
    )  # fmt: skip
