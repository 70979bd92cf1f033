"""A group of parameters that Adam or Lion updates."""

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from cruxy_torch._actuators import apply as _kernels
from cruxy_torch._actuators.apply import Options, Scalars, Tensors
from cruxy_torch._kept import Kept
from cruxy_torch._memory import state as _state
from cruxy_torch._native import library as _native
from cruxy_torch._sensors import measure as _sensors
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

    def momenta(self) -> Sequence[Kept]:
        """The first moment that belongs to each gradient, this rank's shards of them."""
        return self._tensors().exp_avgs

    def sizes(self, *, native: bool) -> _sensors.Sizes | None:
        """Of every tensor with a gradient; `None` without a relative limit."""
        if self.relative_limit is None or not self.grads:
            return None
        return _sensors.sizes(self.columns.params, native=native)

    def _tensors(self) -> Tensors:
        return _state.kept(self.columns, halved=self.halved, stochastic=self.stochastic)

    def update(self, scalars: Scalars, *, native: bool, foreach: bool) -> None:
        """Updates the parameters, moments and averages of one group in place."""
        options = self.options
        if options.centralize:
            _check_centralizable(self.columns.grads)
        tensors = self._tensors()
        if scalars.limits is not None:
            tensors = tensors._replace(limits=scalars.limits.unbind())
        if native and tensors.params and not options.power:
            whole = [c for c in (tensors.grads, tensors.params, tensors.averages) if c]
            moments = [c for c in (tensors.exp_avgs, tensors.exp_avg_sqs) if c]
            fast, slow = _native.parts(whole, moments, centralize=options.centralize)
            for part in fast:
                _native.update(tensors.select(part), scalars, options)
            tensors = tensors.select(slow)
        step = _kernels.foreach if foreach else _kernels.single
        for device, indices in _kernels.by_device(tensors.params).items():
            step(tensors.select(indices), scalars.to(device), options)
        _kernels.average(tensors, scalars.average_weight)


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
