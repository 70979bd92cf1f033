"""Lightning: a callback that hands over losses, tells the end, and validates the average."""

import contextlib
from typing import Any

import pytorch_lightning as lightning
import torch
from torch import Tensor

from cruxy_torch._controlled_optimizer import ControlledOptimizer
from cruxy_torch.training.evaluation import averages
from cruxy_torch.training.horizon import tell_the_end


class CruxyCallback(lightning.Callback):
    """What a `Trainer` of Lightning does for our optimizers where it has this callback.

    An optimizer gets the loss of every batch, whatever the precision, and under
    `accumulate_grad_batches` the mean over those of a step; Lightning itself hands over the last of
    them, divided by their number. Where you call `manual_backward`, hand it over yourself.

    At the beginning of a run a self-driving optimizer that knows no end is told how many steps
    there are, where Lightning knows it, so that its rate falls to 0 at the end. Steps that it took
    before the run are added, so that an optimizer may be used in a second one. Validation, tests
    and predictions see the averages of the parameters where the optimizer keeps some; checkpoints
    hold the weights, from which a run is resumed bit by bit, and the averages in the optimizer's
    state.

    Args:
        pass_horizon: tells the end; `False` for a run without one.

    Examples:
        >>> from cruxy_torch.integrations.lightning import CruxyCallback
        >>> callbacks = [CruxyCallback()]  # of lightning.Trainer(callbacks=callbacks)
    """

    def __init__(self, pass_horizon: bool = True) -> None:
        self._pass_horizon = pass_horizon
        self._open = contextlib.ExitStack()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Tells the end, as far as it is known before a checkpoint is loaded."""
        steps = trainer.estimated_stepping_batches
        if self._pass_horizon and 2 <= steps < float("inf"):
            for own in trainer.optimizers:
                tell_the_end(own, int(steps), trainer.global_step)

    on_train_start = on_fit_start

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

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end
