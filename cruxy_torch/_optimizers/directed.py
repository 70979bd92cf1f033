"""What optimizers with a direction share: how a group of theirs is put together for a step."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cruxy_control.formulas.limits import LIMIT_WIDTH
from cruxy_control.law import needs_alignment
from cruxy_control.self_driving import check_cooldown
from cruxy_control.usual import end_of, told_the_end
from cruxy_torch import _checks
from cruxy_torch._actuators.apply import DirectedGroup, group_of
from cruxy_torch._actuators.direction import Direction
from cruxy_torch._actuators.stepped import Frame
from cruxy_torch._controlled_optimizer import ControlledOptimizer
from cruxy_torch._kept import Kept, compute_dtype
from cruxy_torch._memory.state import (
    add_average,
    add_moment,
    bits_of,
    has_average,
    kept_average,
    numbered,
)
from cruxy_torch._native import library, triton_found
from cruxy_torch._optimizers import cooldown
from cruxy_torch.backends import BackendUse


class DirectedOptimizer(ControlledOptimizer):
    """An optimizer whose subclass says which direction a group takes.

    It writes `_direction_of`, and `_bits` where a group does not name them `state_bits`.
    """

    _stochastic: bool
    _pickled = (*ControlledOptimizer._pickled, "_stochastic")

    @property
    def backend(self) -> BackendUse:
        """What would take a step now: how many tensors each backend, and why the rest no library.

        It is found out when it is asked for, from the choice, gradients, parameters and state as
        they are now, and costs a step nothing. It is what took the last step where none of them was
        changed since: ask inside the block of `use_backend`. Tensors that have not been stepped yet
        are not counted; where a gradient is gone its parameter stands in for it. A tensor that is
        alone of its kind counts under `foreach`, though it is stepped by itself there.

        Examples:
            >>> import torch
            >>> from cruxy_torch import AXIOM
            >>> x = torch.nn.Parameter(torch.ones(3))
            >>> optimizer = AXIOM([x])
            >>> (x**2).sum().backward()
            >>> _ = optimizer.step()
            >>> optimizer.backend
            BackendUse(tensors={'reference': 1}, why={'FactoredDirection has no native pass': 1})
        """
        tensors, why = Counter[str](), Counter[str]()
        for index, group in enumerate(self.param_groups):
            stepped = [p for p in group["params"] if p in self.state]
            if stepped:
                self._count(index, stepped, tensors, why)
        return BackendUse(dict(tensors), dict(why))

    def _count(
        self, index: int, stepped: list[Tensor], tensors: Counter[str], why: Counter[str]
    ) -> None:
        """Counts the tensors of a group by what takes them, and why it is not the C library."""
        if self._compile:
            tensors["compile"] += len(stepped)
            why["compile=True"] += len(stepped)
            return
        device = self._law()["step"].device
        native, foreach = self._path(device)
        group = self.param_groups[index]
        direction, frame = self._direction_of(group, stepped), self._frame(group)
        has_foreach = foreach and direction.foreach is not None and self._release is None
        rest = "foreach" if has_foreach else "reference"
        reason = "" if native is not None else _why_no_library(device)
        if native is not None and direction.pass_of(native.NAME) is None:
            reason = f"{type(direction).__name__} has no native pass"
        if native is None or reason:
            tensors[rest] += len(stepped)
            why[reason] += len(stepped)
            return
        grads = [p.detach() if p.grad is None else _checks.dense_grad(p) for p in stepped]
        lists = stepped, grads, [self.state[p] for p in stepped], list(map(self._number, stepped))
        bits = self._bits(group)
        columns = group_of(
            index, group, lists, direction, frame, bits=bits, stochastic=self._stochastic
        ).columns
        whole = [c for c in (columns.grads, columns.params, columns.averages) if c]
        for row in zip(*whole, *columns.moments.values(), strict=True):
            own, moments = row[: len(whole)], row[len(whole) :]
            reason = native.misfit(own, moments, centralize=frame.centralize)
            tensors[rest if reason else native.NAME] += 1
            if reason:
                why[reason] += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, into the tensors that are here where there are any.

        Unlike the base class it keeps float32 moments of half-precision parameters in float32 and
        codes as codes, shares no memory with the dictionary and leaves it as it was. Moments have
        the bits they were saved with. What a part of a direction keeps and the state lacks, as
        where a schedule is new, starts anew.

        Args:
            state_dict: what `state_dict` gave, of an optimizer with the same groups and law.

        Raises:
            ValueError: where the groups, the law or the format differ, or codes were saved under a
                sharding whose blocks do not fit.
        """
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            stepped = [p for p in group["params"] if p in self.state]
            direction = self._direction_of(group, stepped)
            for param in stepped:
                state = self.state[param]
                direction.start(state, param, self._adder(state, param, group))

    def cooldown(self, steps: int) -> None:
        """Begins to end a run: the rate falls from now to 0 over so many good steps.

        It starts from twice the rate that was found, with Muon inside from that rate itself, or
        from where it is if it falls already, so that an end can be put off. At 0 everything stands
        still; a call then begins once more.

        Args:
            steps: until the rate is 0, at least 1.

        Raises:
            ValueError: where the law is not `SelfDriving`, or `steps` is below 1 or no int32.

        Examples:
            >>> import torch
            >>> import cruxy_torch
            >>> x = torch.nn.Parameter(torch.ones(3))
            >>> optimizer = cruxy_torch.CruxyOptimizer([x], mode="self_driving")
            >>> optimizer.cooldown(steps=2)
            >>> for _ in range(3):
            ...     x.grad = torch.ones(3)
            ...     optimizer.step()
            ...     print(f"{optimizer.telemetry()['learning_rate']:.3f}")
            0.002
            0.001
            0.000
        """
        check_cooldown(steps)
        cooldown.begin(self._law(), self._settings.names, steps)

    def set_total_steps(self, steps: int) -> None:
        """Says how many steps the run has, where that is known only after the optimizer was made.

        The rate is then found in a first part of them and falls to 0 in the rest, see
        `CruxyOptimizer(total_steps=)`.

        Args:
            steps: of the whole run, those that were taken included, at least 2.

        Raises:
            ValueError: where the law is not `SelfDriving`, or `steps` is below 2.

        Examples:
            >>> import torch
            >>> import cruxy_torch
            >>> x = torch.nn.Parameter(torch.ones(3))
            >>> optimizer = cruxy_torch.CruxyOptimizer([x], mode="self_driving")
            >>> optimizer.set_total_steps(500)
            >>> optimizer.total_steps
            500
        """
        law = told_the_end(self._settings.law, steps)
        self._settings = dataclasses.replace(self._settings, law=law)

    @property
    def finds_rate(self) -> bool:
        """Whether the law finds the learning rate on the way, as under self-driving."""
        return needs_alignment(self._settings.law)

    @property
    def total_steps(self) -> int | None:
        """The steps of a run whose end the law knows; `None` for a run without an end."""
        return end_of(self._settings.law)

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
        group = self.param_groups[index]
        params, grads, numbers = [], [], []
        if only is not None:
            self._add([only], group, params, grads, numbers)
            states = [self.state[only]]
        elif torch.compiler.is_compiling():  # whose view of `state` is from before it was made
            names, tensors = [], []
            self._init_group(group, params, grads, numbers, names, tensors)
            left = iter(tensors)
            states = [{name: next(left) for name in own} for own in names]
        else:
            self._init_group(group, params, grads, numbers)
            states = [self.state[param] for param in params]
        return group_of(
            index,
            self._options(group, params),
            (params, grads, states, numbers),
            self._direction_of(group, params),
            self._frame(group),
            bits=self._bits(group),
            stochastic=self._stochastic,
            limit_width=self._limit_width(group),
            late=() if only is not None else self._late(group, params),
        )

    def _limit_width(self, group: dict[str, Any]) -> int | None:
        """The width from which the relative limits of a group fall."""
        return LIMIT_WIDTH

    def _late(self, group: dict[str, Any], moving: Sequence[Tensor]) -> list[tuple[Tensor, Kept]]:
        """The parameters of a group that have an average and do not move now, with it."""
        if group["averaging"] is None or len(moving) == len(group["params"]):
            return []
        moved = set(moving)
        states = ((p, self.state[p]) for p in group["params"] if p in self.state and p not in moved)
        return [(p, kept_average(p, s, self._number(p))) for p, s in states if has_average(s)]

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

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        numbers: list[int],
        names: list[tuple[str, ...]] | None = None,
        tensors: list[Tensor] | None = None,
    ) -> None:
        """Makes missing state; fills lists with parameters that have a gradient, these and numbers.

        The name and the form are torch's: `torch.compile` runs a method of this name eagerly, and
        takes from its lists what is no dictionary. So states come apart for it, in the last two.
        """
        moving = [p for p in group["params"] if p.grad is not None]
        self._add(moving, group, params, grads, numbers)
        if names is not None and tensors is not None:
            for param in params:
                names.append(tuple(self.state[param]))
                tensors.extend(self.state[param].values())

    def _add(
        self,
        moving: list[Tensor],
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        numbers: list[int],
    ) -> None:
        direction = self._direction_of(group)
        wanted = {*direction.moments, *direction.clocks}
        for param in moving:
            grads.append(_checks.dense_grad(param))
            state = self.state[param]
            if not state or not wanted <= state.keys():
                direction.start(state, param, self._adder(state, param, group))
            if group["averaging"] is not None and not has_average(state):
                add_average(state, param, bits_of(param, group["average_bits"]))
            params.append(param)
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


def _why_no_library(device: torch.device) -> str:
    """Why a step asks for no library."""
    if device.type == "cuda":
        return triton_found.found(device).why or "another backend was chosen"
    if device.type != "cpu":
        return f"device {device.type}"
    missing = library.found(build=False).why
    if missing and missing != library.NOT_BUILT:
        return f"no library: {missing}"
    return "another backend was chosen"
