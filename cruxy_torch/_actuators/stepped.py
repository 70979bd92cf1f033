"""What a direction sees of a step: one tensor in blocks, or a bucket of like tensors at once."""

# torch's foreach calls are what torch.optim itself is built on, underscore and all.
# pyright: reportPrivateImportUsage=false

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cruxy_torch._actuators.centralize import centralized
from cruxy_torch._blocks import blocks
from cruxy_torch._columns import Columns
from cruxy_torch._distributed.shards import gathered, over_ranks, own_part
from cruxy_torch._kept import Kept, compute_dtype, read, write
from cruxy_torch._native.fit import Passes
from cruxy_torch._orders import Orders

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Frame(NamedTuple):
    """What a parameter group fixes for whatever direction.

    Attributes:
        weight_decay: its coefficient.
        coupled: adds it to the gradient (L2) instead of to the update.
        centralize: subtracts from a gradient of two or more axes its mean over all but the first.
        decay_scale: the law's factor on the coefficient in this step; `None` for none.
        decay_vectors: whether tensors of fewer than two axes decay too.
    """

    weight_decay: float
    coupled: bool = False
    centralize: bool = False
    decay_scale: Any = None
    decay_vectors: bool = True

    def under(self, orders: Orders) -> "Frame":
        """The same with what the law orders of the weight decay."""
        if orders.decay_scale is None:
            return self
        return self._replace(decay_scale=orders.decay_scale)

    @property
    def l2(self) -> Any:
        """The coefficient of the decay that is added to the gradient; `None` for none."""
        return self._coefficient if self.coupled else None

    @property
    def decay(self) -> Any:
        """The coefficient of the decay that is added to the update; `None` for none."""
        return None if self.coupled else self._coefficient

    @property
    def _coefficient(self) -> Any:
        if not self.weight_decay or self.decay_scale is None:
            return self.weight_decay or None
        return self.weight_decay * self.decay_scale


class SteppedTensor:
    """One tensor in a step, in blocks of rows that keep temporaries small.

    Attributes:
        blocks: how many there are, at least 1; one for all but large tensors.
        numel: elements of the tensor, of a `DTensor` in all its shards.
        shape: of the tensor, likewise.
        state: what `optimizer.state` has of the parameter.
        whole: the gradient as it came, a `DTensor` where the parameter is one.
        keeps: whether a block of the gradient may be kept until the next is asked for.
    """

    keeps = True

    def __init__(
        self,
        columns: Columns,
        index: int,
        frame: Frame,
        orders: Orders,
        native: Passes | None = None,
    ) -> None:
        self._native, self._kept, self._grad = native, columns.params[index], columns.grads[index]
        moments = {n: c[index] for n, c in columns.moments.items() if c and c[index] is not None}
        self.whole, self._frame, self._orders = columns.wholes[index], frame, orders
        param, grad = columns.params[index], columns.grads[index]
        self._dtype = compute_dtype(param)
        parts = list(blocks(grad, param, *moments.values()))
        self._grads: list[Tensor] = [part[0] for part in parts]
        self._params: list[Kept] = [part[1] for part in parts]
        self._all: dict[str, Any] = moments
        self._moments: dict[str, list[Kept]] = {
            name: [part[place] for part in parts] for place, name in enumerate(moments, 2)
        }
        self._last: tuple[int, Tensor] | None = None
        self.blocks, self.numel, self.shape = len(parts), self.whole.numel(), self.whole.shape
        self.state = columns.states[index]

    def place(self, number: int) -> Any:
        """Where along the first axis of this rank's part a block is: an index."""
        if self.blocks == 1:
            return ...
        begin = sum(map(len, self._grads[:number]))
        return slice(begin, begin + len(self._grads[number]))

    def gradient(self, number: int) -> Tensor:
        """A block of the gradient, scaled and clipped; zero on a skipped step (0 * NaN is NaN).

        With coupled weight decay the decay is in it. It is not to be written to.
        """
        if self._last is None or self._last[0] != number or not self.keeps:
            orders, frame, l2 = self._orders, self._frame, self._frame.l2
            x = torch.where(orders.ok, self._grads[number], 0).to(self._dtype) * orders.scale
            if frame.centralize:
                x = centralized(x)
            if l2 is not None:
                x = x + l2 * self.value(number)
            if not self.keeps:
                return x
            self._last = number, x
        return self._last[1]

    def value(self, number: int) -> Tensor:
        """A block of the parameter before the step. It is not to be written to."""
        return read([self._params[number]], [self._dtype])[0]

    def read(self, name: str, number: int) -> Tensor:
        """A block of a moment, decoded where it is kept in fewer bits; it may be written to."""
        return read([self._moments[name][number]], [self._dtype])[0]

    def momentum(self, name: str, number: int) -> Tensor | None:
        """`beta1 m + (1 - beta1) x` of a block, whose moment takes its step by `beta2`.

        `None` where no library does it, and nothing has changed.
        """
        if self._native is None or not self.has_plain_gradient:
            return None
        grad, kept = self._grads[number], self._moments[name][number]
        return self._native.momentum(grad, kept, grad.shape, self._orders)

    @property
    def has_plain_gradient(self) -> bool:
        """Whether the gradient is only scaled: not centralized, and no decay in it."""
        return not self._frame.centralize and self._frame.l2 is None

    def matrix(self) -> Any:
        """What a library does with a whole matrix and its gradient, see `Passes.matrix`."""
        if self._native is None or not self.has_plain_gradient or self.whole is not self._grad:
            return None
        return self._native.matrix(self._kept, self._grad, self._orders)

    def adam(
        self, names: Sequence[str], factors: Sequence[Tensor], rate: Tensor, *, nesterov: bool
    ) -> bool:
        """Adam's whole step by a library; whether it was done.

        Args:
            names: of both moments.
            factors: on the numerator and on the second moment, and what is added to the root.
            rate: of this tensor.
            nesterov: looks one step ahead.
        """
        if self._native is None or not self.has_plain_gradient or self.whole is not self._grad:
            return False
        moments = [self._all[name] for name in names]
        return self._native.adam(
            self._kept, self._grad, moments, factors, rate, self._orders,
            nesterov=nesterov, decay=self.decay,
        )  # fmt: skip

    def sign(self, size: Tensor, rate: Tensor) -> bool:
        """The whole step along the gradient's sign, times a size; whether a library did it."""
        if self._native is None or not self.has_plain_gradient or self.whole is not self._grad:
            return False
        return self._native.sign(self._kept, self._grad, size, rate, self._orders, decay=self.decay)

    @property
    def decay(self) -> tuple[float, Any]:
        """The coefficient of the decay that is added to the update, and the law's factor on it."""
        coupled = self._frame.coupled
        return 0.0 if coupled else float(self._frame.weight_decay), self._frame.decay_scale

    def write(self, name: str, number: int, value: Tensor) -> None:
        """Keeps a block of a moment, in its bits."""
        write([self._moments[name][number]], [value], self._orders.key, self._orders.ok)

    def total(self, part: Tensor, axis: int | None = None) -> Tensor:
        """A sum over this rank's part of the tensor, added up over all ranks that split it.

        Args:
            part: the sum over all blocks.
            axis: the axis that was summed over, the others kept; `None` for all.
        """
        return over_ranks(part, self.whole, axis)

    def gather(self, part: Tensor) -> Tensor:
        """All of a tensor like this one, on every rank, from this rank's part; else the part."""
        return gathered(part, self.whole)

    def scatter(self, full: Tensor) -> Tensor:
        """This rank's part of a tensor like this one that every rank has all of."""
        return own_part(full, self.whole)

    def move(self, number: int, direction: Tensor, rate: Tensor, *, finite: bool) -> None:
        """`p <- p - rate (direction + decay p)` for a block `p` of the parameter (WP 7, 13).

        Args:
            number: of the block.
            direction: of it.
            rate: 0 on a skipped step.
            finite: whether the direction is, also on a skipped step.
        """
        param, decay = self._params[number], self._frame.decay
        if self._native is not None and self._native.move(
            param, direction, rate, self._orders, *self.decay
        ):
            return
        value = self.value(number)
        if decay is not None:
            direction = direction + decay * value
        step = rate * direction
        if not finite:  # a rate of 0 alone would let it through
            step = torch.where(self._orders.ok, step, 0)
        if value is param:
            value.sub_(step)
        else:
            write([param], [value - step], self._orders.key, self._orders.ok)


class Bucket:
    """Like tensors in a step by torch's foreach calls: lists in place of tensors, one block each.

    Attributes:
        values: the parameters before the step. Not to be written to.
        gradients: scaled and clipped; zero on a skipped step.
    """

    def __init__(self, columns: Columns, frame: Frame, orders: Orders) -> None:
        self._columns, self._frame, self._orders = columns, frame, orders
        self._dtypes = [compute_dtype(p) for p in columns.params]
        self.values = read(columns.params, self._dtypes)
        self.gradients = self._read_gradients()

    def _read_gradients(self) -> list[Tensor]:
        # NaN times 0 is NaN, but the bits of any number times the integer 0 are those of +0.
        grads, frame, orders = self._columns.grads, self._frame, self._orders
        bits = [g.view(_BITS[g.element_size()]) for g in grads]
        masked = torch._foreach_mul(bits, orders.ok.to(bits[0].dtype))
        xs = [b.view(g.dtype) for b, g in zip(masked, grads, strict=True)]
        xs = [x.to(dtype) for x, dtype in zip(xs, self._dtypes, strict=True)]
        torch._foreach_mul_(xs, orders.scale)
        if frame.centralize:
            xs = [centralized(x) for x in xs]
        _add_share(xs, self.values, frame.l2)
        return xs

    def has(self, name: str) -> bool:
        """Whether they have this moment: all of them do, or none."""
        return self._columns.moments[name][0] is not None

    def read(self, name: str) -> list[Tensor]:
        """A moment of each, decoded where it is kept in fewer bits; they may be written to."""
        return read(self._columns.moments[name], self._dtypes)

    def write(self, name: str, values: Sequence[Tensor]) -> None:
        """Keeps a moment of each, in its bits."""
        orders = self._orders
        write(self._columns.moments[name], values, orders.key, orders.ok)

    def move(self, directions: list[Tensor], rates: Any) -> None:
        """`p <- p - rate (direction + decay p)` for every parameter `p` (WP 7, 13).

        Args:
            directions: of all; they are written to.
            rates: one rate, or a list with one for each.
        """
        _add_share(directions, self.values, self._frame.decay)
        torch._foreach_mul_(directions, rates)
        new = torch._foreach_sub(self.values, directions)
        write(self._columns.params, new, self._orders.key, self._orders.ok)


def _add_share(xs: list[Tensor], values: list[Tensor], share: Any) -> None:
    """`x + share v`, in place; `share` is a number, a 0-d tensor, or `None` for none."""
    if isinstance(share, Tensor):  # as `alpha` it would be read by the host
        torch._foreach_add_(xs, torch._foreach_mul(values, share))
    elif share is not None:
        torch._foreach_add_(xs, values, alpha=share)
