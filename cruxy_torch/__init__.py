"""PyTorch: `CruxyOptimizer`, the control law around Adam and Lion."""

from cruxy_torch._interop import state_from_optax, state_to_optax
from cruxy_torch._optimizer import CruxyOptimizer

__all__ = ["CruxyOptimizer", "state_from_optax", "state_to_optax"]
