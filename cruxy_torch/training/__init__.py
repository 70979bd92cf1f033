"""A training loop around any of our optimizers, or torch's: one call, exact resume, results."""

from cruxy_torch.training.axiom_trainer import AXIOM_Trainer
from cruxy_torch.training.trainer import Trainer

__all__ = ["AXIOM_Trainer", "Trainer"]
