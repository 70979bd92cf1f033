"""The direction of Muon: a matrix made orthogonal, of one moment."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cruxy_control.formulas.orthogonal import STEPS, orthogonal_scale, orthogonalize
from cruxy_torch._actuators.direction import Direction
from cruxy_torch._actuators.directions import Momentum, Wrapped
from cruxy_torch._actuators.staged import Stages, held, of_matrices
from cruxy_torch._actuators.stepped import SteppedTensor
from cruxy_torch._orders import Orders


@dataclasses.dataclass(frozen=True)
class Orthogonal(Wrapped):
    r"""Muon's direction of a matrix, for `CruxyOptimizer(direction=)` and groups of matrices alone.

    $$
    c_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
    m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t, \qquad
    u_t = 0.1 \sqrt{\max(d_{in}, d_{out})} \; \mathrm{NS}_5(c_t)
    $$

    `betas=(0.9025, 0.95)` is Nesterov's momentum of 0.95. A weight is `(outputs, inputs...)`: all
    axes but the first are inputs, those of a convolution too. Of sharded matrices each rank gathers
    one at a time, computes it and hands its parts back; no rank computes what another does. Others
    of one shape in a group are computed together. On a GPU of compute capability 8.0 or above the
    iteration of a float32 momentum is in bfloat16, as that of `torch.optim.Muon`.

    Attributes:
        inner: the momentum $c$.
        steps: of the Newton-Schulz iteration, at least 1.
        stacked: how many of the first axes count matrices, as that of experts does; of a tensor of
            fewer axes all but two.

    References:
        Jordan et al., [Muon](https://kellerjordan.github.io/posts/muon/), 2024.
    """

    inner: Direction = dataclasses.field(default_factory=Momentum)
    steps: int = STEPS
    stacked: int = 0

    kind = "muon"  # pyright: ignore[reportAssignmentType]
    joins = True  # pyright: ignore[reportAssignmentType]

    def stages(
        self, tensor: SteppedTensor, factors: Any, orders: Orders
    ) -> Stages[Callable[[int], Tensor]]:
        """The direction, computed at once and handed out in blocks."""
        own = yield from held(self.inner, tensor, factors[0], orders)
        part = own[0] if len(own) == 1 else torch.cat(own)
        if len(tensor.shape) < 2:
            raise ValueError(
                "an orthogonal direction is that of a matrix, got a parameter of the shape "
                f"{tuple(tensor.shape)}; put it into a group of its own, as param_groups does."
            )
        direction = yield from of_matrices(self._orthogonal, part, self._counting(tensor.shape))
        return lambda number: direction[tensor.place(number)]

    def _counting(self, shape: Sequence[int]) -> int:
        """How many of the first axes of a tensor count matrices."""
        return min(self.stacked, len(shape) - 2)

    def _orthogonal(self, whole: Tensor, counting: int) -> Tensor:
        """A tensor of whole matrices, each of them orthogonal."""
        count, inputs = math.prod(whole.shape[:counting]), math.prod(whole.shape[counting + 1 :])
        matrices = whole.reshape(count, whole.shape[counting], inputs)
        tall = matrices.shape[1] > matrices.shape[2]
        wide = (matrices.mT if tall else matrices).to(_iterated(whole))
        found = orthogonalize(wide, xp=torch, steps=self.steps).to(whole.dtype)
        found = orthogonal_scale(*wide.shape[1:]) * found
        return (found.mT if tall else found).reshape(whole.shape)


def _iterated(whole: Tensor) -> torch.dtype:
    """What the iteration computes in: bfloat16 moves its result less than it is off."""
    if whole.device.type != "cuda" or whole.dtype != torch.float32:
        return whole.dtype
    quick = torch.cuda.get_device_capability(whole.device) >= (8, 0)
    return torch.bfloat16 if quick else whole.dtype
