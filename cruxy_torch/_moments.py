"""A group of parameters that Adam or Lion updates."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from cruxy_control.self_driving import relative_limit
from cruxy_torch import _kernels, _native, _sensors, _state
from cruxy_torch._kernels import Options, Scalars, Tensors
from cruxy_torch._step import Group
from cruxy_torch._storage import Kept

RELATIVE_FLOOR = 0.01
"""A tensor's size counts as at least this where its rate is limited."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MomentsGroup(Group):
    """Parameters that have a gradient, with the moments that Adam or Lion keeps of them.

    Attributes:
        columns: the parameters, their gradients and their state.
        halved: whether bfloat16 moments are rounded by chance.
        options: what the group fixes.
        stochastic: whether bfloat16 parameters are rounded by chance.
        relative_limit: no tensor's rate is above this share of its size; `None` for no limit.
    """

    columns: _state.Columns
    halved: bool
    options: Options
    stochastic: bool
    relative_limit: float | None = None

    def momenta(self) -> Sequence[Kept]:
        """The first moment that belongs to each gradient, this rank's shards of them."""
        return self._tensors().exp_avgs

    def limits(self) -> Tensor | None:
        """The largest rate for each tensor, by its own size; `None` for no limit."""
        if self.relative_limit is None or not self.grads:
            return None
        squares = _sensors.mean_squares(self.columns.params)
        return relative_limit(squares, self.relative_limit, RELATIVE_FLOOR, xp=torch)

    def _tensors(self) -> Tensors:
        return _state.kept(self.columns, halved=self.halved, stochastic=self.stochastic)

    def update(self, scalars: Scalars, *, native: bool, foreach: bool) -> None:
        """Updates the parameters and moments of one group in place."""
        options = self.options
        if options.centralize:
            _check_centralizable(self.columns.grads)
        tensors = whole = self._tensors()
        if scalars.limits is not None:
            tensors = tensors._replace(limits=scalars.limits.unbind())
        if native and tensors.params and not options.power:
            fast, slow = _native.parts(tensors, options)
            for part in fast:
                _native.update(tensors.select(part), scalars, options)
            tensors = tensors.select(slow)
        step = _kernels.foreach if foreach else _kernels.single
        for device, indices in _kernels.by_device(tensors.params).items():
            step(tensors.select(indices), scalars.to(device), options)
        _kernels.average(whole, scalars.average_weight)


def _check_centralizable(grads: list[Tensor]) -> None:
    for grad in grads:
        if _sensors.is_sharded(grad) and any(
            placement.is_shard() and not placement.is_shard(0) for placement in grad.placements
        ):
            raise ValueError(
                "use_gc needs whole rows on each rank, got a gradient placed as "
                f"{grad.placements}; shard that parameter along its first axis, or give it a "
                "parameter group with use_gc=False."
            )
