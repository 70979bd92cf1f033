"""PyTorch: `CruxyOptimizer`, the control law around Adam and Lion."""

from cruxy_torch._axiom import AXIOM
from cruxy_torch._cosmic import Cosmic
from cruxy_torch._interop import state_from_optax, state_to_optax
from cruxy_torch._memory import MemoryEstimate, estimate_memory, state_bytes
from cruxy_torch._optimizer import CruxyOptimizer

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
