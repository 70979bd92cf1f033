"""PyTorch: `CruxyOptimizer` and its relatives, the control law on `torch.optim`."""

from cruxy_torch._actuators.direction import Direction
from cruxy_torch._diagnose import DebugCheck
from cruxy_torch._interop import state_from_optax, state_to_optax
from cruxy_torch._memory.estimate import MemoryEstimate, estimate_memory, state_bytes
from cruxy_torch._optimizers.axiom import AXIOM
from cruxy_torch._optimizers.cosmic import Cosmic
from cruxy_torch._optimizers.cruxy import CruxyOptimizer
from cruxy_torch.backends import Backend, BackendUse, backends, use_backend

__all__ = [
    "AXIOM",
    "Backend",
    "BackendUse",
    "Cosmic",
    "CruxyOptimizer",
    "DebugCheck",
    "Direction",
    "MemoryEstimate",
    "backends",
    "estimate_memory",
    "state_bytes",
    "state_from_optax",
    "state_to_optax",
    "use_backend",
]
