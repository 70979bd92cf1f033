"""Lightning: a callback that hands over losses, tells the end, and validates the average."""

import contextlib
from typing import Any

import pytorch_lightning as lightning
import torch
from torch import Tensor

from cruxy_torch._controlled_optimizer import ControlledOptimizer
from cruxy_torch._optimizers.directed import DirectedOptimizer
from cruxy_torch.training.evaluation import averages


class CruxyCallback(lightning.Callback):
    """What a `Trainer` of Lightning does for our optimizers where it has this callback.

    An optimizer gets the loss of every batch, whatever the precision, and under
    `accumulate_grad_batches` the mean over those of a step; Lightning itself hands over the last of
    them, divided by their number. Where you call `manual_backward`, hand it over yourself.

    At the beginning of a run a self-driving optimizer that knows no end is told how many steps
    there are, where Lightning knows it, so that its rate falls to 0 at the end. Validation and
    tests see the averages of the parameters where the optimizer keeps some; checkpoints hold the
    weights, from which a run is resumed bit by bit, and the averages in the optimizer's state.

    Args:
        pass_horizon: tells the end; `False` for a run without one.

    Examples:
        >>> from cruxy_torch.integrations.lightning import CruxyCallback
        >>> callbacks = [CruxyCallback()]  # of lightning.Trainer(callbacks=callbacks)
    """

    def __init__(self, pass_horizon: bool = True) -> None:
        self._pass_horizon = pass_horizon
        self._open = contextlib.ExitStack()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Tells the end."""
        steps = trainer.estimated_stepping_batches
        if not self._pass_horizon or steps == float("inf") or steps < 2:
            return
        for own in trainer.optimizers:
            if isinstance(own, DirectedOptimizer) and own.finds_rate and own.total_steps is None:
                own.set_total_steps(int(steps))

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Hands over the loss of a batch, in its own size."""
        if not pl_module.automatic_optimization:
            return
        loss = loss.detach() * trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            loss = loss / scaler.scale(torch.ones_like(loss))
        for own in trainer.optimizers:
            if isinstance(own, ControlledOptimizer):
                own.observe(loss)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Puts the averages in the place of the parameters."""
        for own in trainer.optimizers or ():
            self._open.enter_context(averages(own))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Brings the parameters back."""
        self._open.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Likewise."""
        self._open.close()

    on_test_start = on_validation_start
    on_test_end = on_validation_end
