"""PyTorch: `CruxyOptimizer` and its relatives, the control law on `torch.optim`."""

import cruxy_torch._extra  # noqa: F401

# isort: split
from cruxy_control.extras import version
from cruxy_control.role_table import RoleRow, RoleTable
from cruxy_torch._actuators.direction import Direction
from cruxy_torch._actuators.directions import Momentum, SignBlend
from cruxy_torch._actuators.lora_pid import BlendByLoraPid
from cruxy_torch._actuators.orthogonal import Orthogonal
from cruxy_torch._actuators.slices import BalanceSlices, ScaleSlices
from cruxy_torch._actuators.trust import AdaptiveGradientClip, ClipRms, TrustRatio
from cruxy_torch._diagnose import DebugCheck
from cruxy_torch._distributed.compressed import (
    CompressedAllReduce,
    CompressedReduceScatter,
    compress_fsdp,
    compressed_allreduce_hook,
    local_gradients_hook,
)
from cruxy_torch._distributed.top_k import AXIOM_DDP, TopK
from cruxy_torch._interop import state_from_optax, state_to_optax
from cruxy_torch._memory.activations import ActivationStore, compress_activations
from cruxy_torch._memory.estimate import MemoryEstimate, state_bytes
from cruxy_torch._memory.slots import AXIOM_CHECKPOINT
from cruxy_torch._models.estimate import estimate_memory
from cruxy_torch._models.weights import load_model
from cruxy_torch._optimizers.axiom import AXIOM
from cruxy_torch._optimizers.cosmic import Cosmic
from cruxy_torch._optimizers.cruxy import CruxyOptimizer
from cruxy_torch._optimizers.tiger import Tiger
from cruxy_torch._optimizers.voting import merge_votes
from cruxy_torch._roles.groups import param_groups
from cruxy_torch._roles.labels import RoleMask, label_roles, role_mask
from cruxy_torch._roles.layouts import qkv_slices
from cruxy_torch._roles.table import role_table
from cruxy_torch._roles.tagged import build_tagged_param_groups
from cruxy_torch.backends import Backend, BackendUse, backends, use_backend
from cruxy_torch.training import AXIOM_Trainer, Trainer

__version__ = version()

__all__ = [
    "AXIOM",
    "AXIOM_CHECKPOINT",
    "AXIOM_DDP",
    "AXIOM_Trainer",
    "ActivationStore",
    "AdaptiveGradientClip",
    "Backend",
    "BackendUse",
    "BalanceSlices",
    "BlendByLoraPid",
    "ClipRms",
    "CompressedAllReduce",
    "CompressedReduceScatter",
    "Cosmic",
    "CruxyOptimizer",
    "DebugCheck",
    "Direction",
    "MemoryEstimate",
    "Momentum",
    "Orthogonal",
    "RoleMask",
    "RoleRow",
    "RoleTable",
    "ScaleSlices",
    "SignBlend",
    "Tiger",
    "TopK",
    "Trainer",
    "TrustRatio",
    "backends",
    "build_tagged_param_groups",
    "compress_activations",
    "compress_fsdp",
    "compressed_allreduce_hook",
    "estimate_memory",
    "label_roles",
    "load_model",
    "local_gradients_hook",
    "merge_votes",
    "param_groups",
    "qkv_slices",
    "role_mask",
    "role_table",
    "state_bytes",
    "state_from_optax",
    "state_to_optax",
    "use_backend",
]
