"""The relative limit: how large a rate may be for a tensor, by the size of the tensor."""

import math
from collections.abc import Sequence
from typing import Any

from cruxy_control.signals import root

RELATIVE_FLOOR = 0.01
"""A tensor's size counts as at least this where its rate is limited: zeros could never move."""

LIMIT_WIDTH = 64
"""The width up to which a relative limit is what it says: that of the model it was chosen on."""


def width_of(shape: Sequence[int]) -> int:
    """The smaller side of the matrix that a tensor is, however its axes are laid out.

    Of all ways to cut the axes into those before and those behind, the one with the largest smaller
    side counts: `(out, in, 3, 3)` and `(3, 3, in, out)` have one width, as have `(d, d)`,
    `(d, heads, d / heads)` and a stack of such. What has fewer than two axes has a width of 1. A
    shape does not tell a stack from a matrix, and that of `(layers, d, 4 d)` counts as wider than
    one of its matrices, never as narrower.

    Args:
        shape: of the whole tensor.
    """
    if len(shape) < 3:  # most tensors of most models, in every step of some optimizers
        return max(1, min(shape)) if len(shape) == 2 else 1
    width, before, elements = 1, 1, math.prod(shape)
    for size in shape[:-1]:
        before *= size
        if before:
            width = max(width, min(before, elements // before))
    return width


def width_share(shape: Sequence[int], width: Any = LIMIT_WIDTH) -> Any:
    """The share of a relative limit that is left to a tensor: `min(1, sqrt(width / width_of))`.

    Elements that all move by one rate can change a matrix of width d by d times the rate in
    spectral norm, where that norm is itself about 2 sqrt(d) times the size of an element. So the
    share of its size that a matrix may move falls as 1 / sqrt(d). Of an orthogonal step the
    spectral norm is the same at every width, and needs no such share.

    Args:
        shape: of the whole tensor.
        width: up to which it is 1, a number or a scalar array; `None` for all.
    """
    if width is None:
        return 1.0
    ratio = width / width_of(shape)
    return math.sqrt(min(1.0, ratio)) if isinstance(ratio, float) else ratio.clip(max=1.0) ** 0.5


def relative_limit(
    mean_square: Any, limit: Any, floor: Any, *, xp: Any, whole: Any = None, share: Any = None
) -> Any:
    """The largest rate for a tensor: `limit * max(min(rms(theta), rms(whole)), floor) * share`.

    The directions of Adam and Lion have size 1 or less, so that no step moves a tensor by more than
    this share of its own size. The same scale is Adafactor's relative step (Shazeer and Stern 2018,
    arXiv:1804.04235, section 8), there as a factor, here as a bound. `whole` makes it a bound on
    one rate for all tensors too: without it the largest tensors, which are the scales of
    normalizations, let the rate wind up far above what the matrices follow, and the matrices stay
    at their limits for as long as it takes to come back.

    Args:
        mean_square: of the tensor; float32.
        limit: above 0.
        floor: size below which a tensor counts as this large, above 0, such as `RELATIVE_FLOOR`.
        xp: the array namespace.
        whole: the mean square of all parameters together, which bounds that of the tensor where it
            is a number; `None` for no bound.
        share: from `width_share`; `None` for 1.
    """
    square = mean_square if whole is None else xp.fmin(mean_square, whole)
    limit = limit * xp.clip(root(square, xp=xp), floor, float("inf"))
    return limit if share is None else limit * share


def rate_share(largest: Any, rate: Any, *, xp: Any) -> Any:
    """`Signals.limit_scale`: the share that a limit leaves of a rate; 0 of 0, which moves nothing.

    Args:
        largest: that is allowed, the largest of all tensors; `None` where there is no limit.
        rate: what it bounds.
        xp: the array namespace.
    """
    share = xp.ones_like(rate) if largest is None else limit_scale(largest, rate, xp=xp)
    return xp.where(rate > 0.0, share, 0.0)


def limit_scale(largest: Any, rate: Any, *, xp: Any) -> Any:
    """The share that a limit leaves of a rate, or of the size of an update; 1 of 0.

    It is 1 to the bit where the limit does not bind, also where a number over itself is not, as in
    float32 by XLA on a GPU.

    Args:
        largest: that is allowed, as `relative_limit` gives it.
        rate: what it bounds.
        xp: the array namespace.
    """
    binds = (rate > 0.0) & ((largest < rate) | (largest != largest))
    # Not 0 / 0 even where that is not chosen: its derivative is.
    return xp.where(binds, largest / xp.where(binds, rate, 1.0), 1.0)
