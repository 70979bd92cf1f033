"""AXIOM's direction: the gradient over the root of a factored second moment, averaged or not."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cruxy_control.formulas.factored import (
    factored_axes,
    second_moment_decay,
    snr_factor,
    streak_factor,
)
from cruxy_control.formulas.moments import seen
from cruxy_torch._actuators import factored
from cruxy_torch._actuators.moments import advanced
from cruxy_torch._actuators.staged import Staged, Stages, total
from cruxy_torch._actuators.stepped import SteppedTensor
from cruxy_torch._columns import Columns
from cruxy_torch._kept import assign
from cruxy_torch._native.fit import SetAsideError
from cruxy_torch._orders import Orders

SMALLEST_RMS = 1e-3
"""A tensor of a smaller root mean square moves as if it had this one (Adafactor, section 8)."""


@dataclasses.dataclass(frozen=True)
class FactoredDirection(Staged):
    """What `AXIOM` documents.

    Attributes:
        momentum: decay rate of the average of the normalised gradient; 0 for none.
        decay_rate: exponent of the second moment's decay.
        clip_rms: the largest root mean square of a normalised gradient; `None` for no limit.
        relative_step: multiplies a tensor's step by the tensor's root mean square.
        streak_boost: largest factor on coordinates whose sign persists; 1 for none.
        snr_floor: signal-to-noise ratio below which a row is damped; 0 for none.
        min_dim_size_to_factor: the shortest axis over which a tensor is factored.
        power: of the root that a gradient is divided by.
    """

    momentum: float
    decay_rate: float
    clip_rms: float | None
    relative_step: bool
    streak_boost: float
    snr_floor: float
    min_dim_size_to_factor: int
    power: float = 1.0

    is_finite = True

    @property
    def holds(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The average, where its rows are summed over ranks."""
        return self.snr_floor > 0.0

    @property
    def moments(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The average of the normalised gradient, where there is momentum."""
        return ("exp_avg",) if self.momentum else ()

    @property
    def clocks(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The product of the average's decay rates."""
        return ("beta1_product",) if self.momentum else ()

    def start(self, state: dict[str, Any], param: Tensor, add: Callable[[str], None]) -> None:
        """Adds what is missing: the second moment, a counter, the average."""
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.int32, device=param.device)
            state |= factored.start(param, self.min_dim_size_to_factor)
        super().start(state, param, add)

    def advance(self, columns: Columns, orders: Orders) -> Sequence[Any]:
        """Of each tensor the second moment's decay, and the normaliser of the average."""
        if not columns.states:
            return []
        counters = [state["step"] for state in columns.states]
        steps = torch.stack(counters)
        decays = second_moment_decay(steps.to(torch.float32), self.decay_rate, xp=torch)
        decays = torch.where(orders.ok, decays, 1.0).unbind()
        assign(counters, (steps + orders.ok).unbind())
        if not self.momentum:
            return [(decay, None) for decay in decays]
        products = [state["beta1_product"] for state in columns.states]
        gains = 1.0 / seen(advanced(products, self._beta(orders)), xp=torch)
        return list(zip(decays, gains.unbind(), strict=True))

    def stages(
        self, tensor: SteppedTensor, factors: Any, orders: Orders
    ) -> Stages[Callable[[int], Tensor]]:
        """The normalised gradient, its size limited, averaged, and in units of the tensor's."""
        decay, gain = factors
        u = yield from factored.normalise(tensor, decay, orders.ok, self.power)
        squares = [u.squares]
        if self.relative_step:
            each = [tensor.value(i).square().sum() for i in range(tensor.blocks)]
            squares.append(torch.stack(each).sum())
        squares = yield from total(torch.stack(squares))
        sizes = (squares / max(1, tensor.numel)).sqrt().unbind()
        clip = self._clip(sizes[0])

        def averaged(number: int) -> Tensor:
            direction = u.block(number) * clip
            return (
                self._averaged(tensor, number, direction, gain, orders)
                if gain is not None
                else direction
            )

        average, noise = averaged, None
        if self.snr_floor and tensor.shape and not tensor.keeps:
            average = [averaged(i) for i in range(tensor.blocks)].__getitem__
            noise = yield from self._noise(tensor, average)

        def block(number: int) -> Tensor:
            direction = average(number)
            if gain is not None:
                known = None if noise is None else noise[tensor.place(number)]
                direction = self._weighed(direction, known)
            if self.relative_step:
                direction = direction * sizes[1].clip(min=SMALLEST_RMS)
            return direction

        return block

    def fused(self, tensor: SteppedTensor, factors: Any, orders: Orders, rate: Tensor) -> bool:
        """The step of a matrix without momentum, see `Direction.fused`."""
        state = tensor.state
        matrix = None if self.momentum or "row_var" not in state else tensor.matrix()
        if matrix is None:
            return False
        second, first = factored_axes(tensor.shape, 0) or (0, 0)
        row, column, (decay, _) = state["row_var"], state["col_var"], factors
        try:
            sums = matrix.square_sums()
            new_row = factored.advanced(row, sums[first] / tensor.shape[first], decay)
            new_column = factored.advanced(column, sums[second] / tensor.shape[second], decay)
            mean = new_row.sum(second, keepdim=True) / tensor.shape[second]
            pair = factored.inverses(new_row, new_column, mean, orders.ok, self.power)
            sizes = (matrix.sizes(pair) / max(1, tensor.numel)).sqrt().unbind()
            clip, size = self._clip(sizes[0]), None
            if self.relative_step:
                size = sizes[1].clip(min=SMALLEST_RMS)
            matrix.move(pair, clip, size, rate, *tensor.decay)
        except SetAsideError:  # nothing has been written by then
            return False
        assign([row, column], [new_row, new_column])
        return True

    def _clip(self, size: Tensor) -> Tensor:
        """The factor that limits the root mean square of a normalised gradient."""
        if self.clip_rms is None:
            return torch.ones_like(size)
        return 1.0 / (size / self.clip_rms).clip(min=1.0)

    def _noise(self, tensor: SteppedTensor, average: Callable[[int], Tensor]) -> Stages[Tensor]:
        """The signal-to-noise ratio of every row, over all ranks."""
        rows = [average(i).square().sum(-1, keepdim=True) for i in range(tensor.blocks)]
        whole = yield from total(torch.cat(rows), len(tensor.shape) - 1)
        return whole / tensor.shape[-1]

    def _beta(self, orders: Orders) -> Tensor:
        """The decay rate of the average, which is not the law's to move; 1 on a skipped step."""
        return torch.where(orders.ok, torch.full_like(orders.rate, self.momentum), 1.0)

    def _averaged(
        self, tensor: SteppedTensor, number: int, u: Tensor, gain: Tensor, orders: Orders
    ) -> Tensor:
        """The average of `u`, bias-corrected."""
        beta = self._beta(orders)
        average = beta * tensor.read("exp_avg", number) + (1.0 - beta) * u
        tensor.write("exp_avg", number, average)
        return average * gain

    def _weighed(self, m_hat: Tensor, ratio: Tensor | None) -> Tensor:
        """The average, louder where signs persist, softer in rows that are mostly noise.

        Args:
            m_hat: a block of the average. As `u` has size 1, its square is the signal-to-noise
                ratio of a coordinate.
            ratio: of every row; `None` where all of a row is in the block.
        """
        direction = m_hat
        if self.streak_boost > 1.0:
            direction = direction * streak_factor(m_hat, self.streak_boost, xp=torch)
        if self.snr_floor > 0.0:
            if ratio is None:
                ratio = m_hat.square()
                ratio = ratio.sum(-1, keepdim=True) / m_hat.shape[-1] if m_hat.ndim else ratio
            direction = direction * snr_factor(ratio, self.snr_floor, xp=torch)
        return direction
