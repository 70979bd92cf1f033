"""PyTorch: `CruxyOptimizer`, the control law around Adam and Lion."""

from cruxy_torch._interop import state_from_optax, state_to_optax
from cruxy_torch._memory.estimate import MemoryEstimate, estimate_memory, state_bytes
from cruxy_torch._optimizers.axiom import AXIOM
from cruxy_torch._optimizers.cosmic import Cosmic
from cruxy_torch._optimizers.cruxy import CruxyOptimizer

__all__ = [
    "AXIOM",
    "Cosmic",
    "CruxyOptimizer",
    "MemoryEstimate",
    "estimate_memory",
    "state_bytes",
    "state_from_optax",
    "state_to_optax",
]
