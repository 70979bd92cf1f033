"""A group of parameters that Adam or Lion updates."""

import dataclasses

from torch import Tensor

from cruxy_torch import _kernels, _native, _sensors, _state
from cruxy_torch._kernels import Options, Scalars
from cruxy_torch._step import Group


@dataclasses.dataclass(frozen=True, kw_only=True)
class MomentsGroup(Group):
    """Parameters that have a gradient, with the moments that Adam or Lion keeps of them.

    Attributes:
        columns: the parameters, their gradients and their state.
        halved: whether bfloat16 moments are rounded by chance.
        options: what the group fixes.
        stochastic: whether bfloat16 parameters are rounded by chance.
    """

    columns: _state.Columns
    halved: bool
    options: Options
    stochastic: bool

    def update(self, scalars: Scalars, *, native: bool, foreach: bool) -> None:
        """Updates the parameters and moments of one group in place."""
        options = self.options
        if options.centralize:
            _check_centralizable(self.columns.grads)
        tensors = _state.kept(self.columns, halved=self.halved, stochastic=self.stochastic)
        if native and tensors.params and not options.power:
            fast, slow = _native.parts(tensors, options)
            for part in fast:
                _native.update(tensors.select(part), scalars, options)
            tensors = tensors.select(slow)
        step = _kernels.foreach if foreach else _kernels.single
        for device, indices in _kernels.by_device(tensors.params).items():
            step(tensors.select(indices), scalars.to(device), options)


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
