"""What optimizers with a direction share: how a group of theirs is put together for a step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cruxy_torch import _checks
from cruxy_torch._actuators.apply import DirectedGroup, group_of
from cruxy_torch._actuators.direction import Direction
from cruxy_torch._actuators.stepped import Frame
from cruxy_torch._controlled_optimizer import ControlledOptimizer
from cruxy_torch._kept import compute_dtype
from cruxy_torch._memory.state import add_moment, bits_of, numbered


class DirectedOptimizer(ControlledOptimizer):
    """An optimizer whose subclass says which direction a group takes.

    It writes `_direction_of`, and `_bits` where a group does not name them `state_bits`.
    """

    _stochastic: bool
    _pickled = (*ControlledOptimizer._pickled, "_stochastic")

    def _direction_of(self, group: dict[str, Any], moving: Sequence[Tensor] = ()) -> Direction:
        """The direction of a group, of which these parameters have a gradient."""
        raise TypeError(f"{type(self).__name__} must say what its direction is.")

    def _frame(self, group: dict[str, Any]) -> Frame:
        return Frame(group["weight_decay"])

    def _bits(self, group: dict[str, Any], param: Tensor | None = None) -> int:
        """Bits an element in which the moments of a group are kept, or those of a parameter."""
        bits = group["state_bits"]
        return bits if param is None else bits_of(param, bits)

    def _moment_dtype(self, param: Tensor, name: str) -> torch.dtype:
        """The dtype of a moment of 32 bits."""
        return compute_dtype(param)

    def _group(self, index: int, only: Tensor | None = None) -> DirectedGroup:
        group, lists = self.param_groups[index], ([], [], [], [])
        if only is None:
            self._init_group(group, *lists)
        else:
            self._add([only], group, *lists)
        return group_of(
            index,
            self._options(group, lists[0]),
            lists,
            self._direction_of(group, lists[0]),
            self._frame(group),
            bits=self._bits(group),
            stochastic=self._stochastic,
            late=() if only is not None else self._late(group, lists[0]),
        )

    def _late(self, group: dict[str, Any], moving: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The parameters of a group that have an average and do not move now, with it."""
        if group["averaging"] is None or len(moving) == len(group["params"]):
            return []
        moved = set(moving)
        states = ((p, self.state[p]) for p in group["params"] if p in self.state and p not in moved)
        return [(param, state["average"]) for param, state in states if "average" in state]

    def _late_group(self, index: int, moving: Sequence[Tensor]) -> DirectedGroup | None:
        """What moves in a group at the end of a pass that has updated these: late averages."""
        group, moved = self.param_groups[index], set(moving)
        late = self._late(group, [p for p in group["params"] if p in moved])
        if not late:
            return None
        nothing = ([], [], [], [])
        direction, frame = self._direction_of(group), self._frame(group)
        bits = self._bits(group)
        return group_of(
            index, group, nothing, direction, frame, bits=bits, stochastic=False, late=late
        )

    def _options(self, group: dict[str, Any], moving: Sequence[Tensor]) -> dict[str, Any]:
        """The options of a group as a step takes them."""
        return group

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> None:
        """Fills lists with parameters that have a gradient, these, states and numbers.

        The name and the form are torch's: `torch.compile` runs a method of this name eagerly.
        """
        self._add([p for p in group["params"] if p.grad is not None], group, *lists)

    def _add(self, moving: list[Tensor], group: dict[str, Any], *lists: list[Any]) -> None:
        params, grads, states, numbers = lists
        direction = self._direction_of(group)
        wanted = {*direction.moments, *direction.clocks}
        for param in moving:
            grads.append(_checks.dense_grad(param))
            state = self.state[param]
            if not state or not wanted <= state.keys():
                direction.start(state, param, self._adder(state, param, group))
            if group["averaging"] is not None and "average" not in state:
                state["average"] = param.detach().to(compute_dtype(param), copy=True)
            params.append(param)
            states.append(state)
            numbers.append(self._number(param))

    def _adder(
        self, state: dict[str, Any], param: Tensor, group: dict[str, Any]
    ) -> Callable[[str], None]:
        def add(name: str) -> None:
            dtype = self._moment_dtype(param, name)
            add_moment(state, name, param, dtype, self._bits(group, param))

        return add

    def _number(self, param: Tensor) -> int:
        """The number of a parameter's first element, from which its random bits follow."""
        if param not in self._numbers:  # the first, or one that was put in another's place
            everything = (p for group in self.param_groups for p in group["params"])
            self._numbers = numbered(everything)
        return self._numbers[param]
