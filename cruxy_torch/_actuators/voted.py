"""Lion by majority vote: every rank keeps its own momentum, and the ranks vote on each sign."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_exact.votes import ballots, coins
from cruxy_torch._actuators.direction import Direction
from cruxy_torch._actuators.stepped import Frame, SteppedTensor
from cruxy_torch._columns import Columns
from cruxy_torch._distributed.votes import majority_of
from cruxy_torch._kept import assign, numbers
from cruxy_torch._orders import Orders


@dataclasses.dataclass(frozen=True)
class VotedLion(Direction):
    """Lion's sign (WP 11) by the majority of the ranks, each with a momentum of its own (WP 12).

    Attributes:
        group: the ranks that vote.
        frame: of the parameter group, whose centralization comes before the vote.
    """

    group: dist.ProcessGroup
    frame: Frame

    is_finite = True
    moments = ("exp_avg",)

    def start(self, state: dict[str, Any], param: Tensor, add: Callable[[str], None]) -> None:
        """Adds the momentum, and the number of good steps, which turns the coins over."""
        if "vote_step" not in state:
            state["vote_step"] = torch.zeros((), dtype=torch.int32, device=param.device)
        super().start(state, param, add)

    def advance(self, columns: Columns, orders: Orders) -> Sequence[Any]:
        """The majority on each element: one exchange for all tensors together."""
        if not columns.states:
            return []
        own, thrown = [], []
        for index, state in enumerate(columns.states):
            tensor = SteppedTensor(columns, index, self.frame, orders)
            parts = [self._average(tensor, number, orders) for number in range(tensor.blocks)]
            c = parts[0] if len(parts) == 1 else torch.cat(parts)
            elements = numbers(c.numel(), 0, c.device).view(c.shape)
            coin = coins(state["vote_step"], 0, index, elements, xp=torch)
            own.append(ballots(c, coin, xp=torch))
            thrown.append(coin)
        counters = [state["vote_step"] for state in columns.states]
        assign(counters, (torch.stack(counters) + orders.ok).unbind())
        return majority_of(own, thrown, self.group)

    def blocks(
        self, tensor: SteppedTensor, factors: Any, orders: Orders
    ) -> Callable[[int], Tensor]:
        """The majority as 1 and -1; the momentum is this rank's own."""

        def block(number: int) -> Tensor:
            x, m = tensor.gradient(number), tensor.read("exp_avg", number)
            tensor.write("exp_avg", number, orders.beta2 * m + (1.0 - orders.beta2) * x)
            return torch.where(factors[tensor.place(number)], 1.0, -1.0).to(x.dtype)

        return block

    @staticmethod
    def _average(tensor: SteppedTensor, number: int, orders: Orders) -> Tensor:
        momentum = tensor.read("exp_avg", number)
        return orders.beta1 * momentum + (1.0 - orders.beta1) * tensor.gradient(number)
