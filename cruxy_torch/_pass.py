"""A step spread over a backward pass: each parameter at its own time, the law at the end."""

from typing import Any

import torch
from torch import Tensor

from cruxy_control.controls import clip_scale
from cruxy_torch import _law_state as _controller
from cruxy_torch import _step
from cruxy_torch._actuators.apply import Scalars
from cruxy_torch._sensors import measure as _sensors


class Pass:
    """One pass, from the first gradient to `close`.

    What the law ordered on the last good step holds for all of it. Two things are decided anew for
    each parameter, from its own gradient: whether it is finite, and by how much it is clipped.

    Args:
        settings: see there.
        memory: the controller's.
        whole: the mean square of all tensors under a limit, see `_step.completed`.
    """

    def __init__(
        self, settings: _step.Settings, memory: dict[str, Tensor], whole: Tensor | None
    ) -> None:
        self._settings, self._memory, self._whole = settings, memory, whole
        self._xp = _controller.namespace(memory)
        held = _controller.held(memory)
        self._controls = held._replace(clip_scale=self._xp.ones_like(held.clip_scale))
        self._key: Any = None
        self._one = torch.ones((), device=memory["step"].device)
        self._total = torch.zeros(2, device=memory["step"].device)
        self._meshes: dict[Any, None] = {}
        self._applied: dict[int, Scalars] = {}

    def update(self, group: _step.Group, *, native: bool) -> None:
        """Measures and updates one parameter; what it measured counts at `close`.

        Args:
            group: with that parameter alone.
            native: takes the C library where it can.
        """
        (grad,) = group.grads
        if _sensors.is_sharded(grad):
            self._meshes[grad.device_mesh] = None
        gamma = self._settings.law.gamma
        total = _sensors.whole_sums(grad, gamma, self._one, native=native)
        self._total += total
        signals = _sensors.signals(total, self._one, gamma)
        norm, sigma = _controller.scalars((signals.grad_norm, signals.gamma_norm), self._xp)
        with _controller.quiet(self._xp):
            ok = self._xp.isfinite(norm) & self._xp.isfinite(sigma)
            factor = clip_scale(self._controls.clip_threshold, norm, xp=self._xp)
            scalars = self._scalars(group).guarded(ok, factor, xp=self._xp)
            (count,) = _controller.scalars([self._memory["step"]], self._xp)
            sizes = group.sizes(native=native)
            scalars = _step.completed(group, scalars, count, sizes, self._whole, xp=self._xp)
        group.update(scalars, native=native, foreach=False)

    def close(self, group: _step.Group, loss: Tensor) -> None:
        """Steps the law with what the whole pass has measured.

        Args:
            group: the first, whose rate and betas are reported.
            loss: float32, 0-d, NaN where there is none.
        """
        signals = _sensors.conclude(self._total, loss, self._meshes, self._settings.law.gamma)
        controls = _controller.advance(
            self._settings.law, self._settings.names, self._memory, signals
        )
        _step.report(self._memory, signals, controls, self._scalars(group))

    def _scalars(self, group: _step.Group) -> Scalars:
        """What a group applies to a gradient that is finite and not clipped."""
        if group.rounds and self._key is None:
            self._key = _step.random_key(self._memory)
        if group.index not in self._applied:
            self._applied[group.index] = _step.scalars(
                group, self._controls, self._one, 0, self._settings, xp=self._xp
            )
        return self._applied[group.index]._replace(key=self._key if group.rounds else 0)
