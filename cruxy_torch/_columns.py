"""The tensors of a step, one list per kind: parameters, gradients, and what is kept beside them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from cruxy_torch._kept import Kept


class Columns(NamedTuple):
    """Parameters that have a gradient with all that belongs to them, on this rank.

    Attributes:
        params: the parameters, this rank's shard of each.
        grads: their raw gradients, likewise.
        wholes: the gradients as they came, a `DTensor` where the parameter is one.
        states: what `optimizer.state` has of each.
        moments: by name, what a direction keeps that is shaped like its parameter; `None` for a
            tensor that has none. `exp_avg` is the first.
        averages: the average of each parameter, float32 or float64; empty for none.
        limits: the largest rate of each, float32 of shape `()`; empty for none.
    """

    params: list[Kept]
    grads: list[Tensor]
    wholes: list[Tensor]
    states: list[dict[str, Any]]
    moments: dict[str, Sequence[Any]]
    averages: Sequence[Tensor] = ()
    limits: Sequence[Tensor] = ()

    def select(self, indices: Sequence[int]) -> "Columns":
        """The same lists with only these tensors, given in order."""
        if len(indices) == len(self.params):
            return self

        def at(column: Sequence[Any]) -> list[Any]:
            return [column[i] for i in indices] if column else []

        return Columns(
            at(self.params),
            at(self.grads),
            at(self.wholes),
            at(self.states),
            {name: at(column) for name, column in self.moments.items()},
            at(self.averages),
            at(self.limits),
        )
