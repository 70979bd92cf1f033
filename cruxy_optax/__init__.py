"""The Cruxy Stability Engine for JAX: optimizers and composable gradient transformations."""

import cruxy_optax._extra  # noqa: F401

# isort: split
from cruxy_control import Meta3, PlateauGuard, SelfDriving, StabilityV1, StabilityV2
from cruxy_control.extras import version
from cruxy_control.role_table import RoleRow, RoleTable
from cruxy_optax._actuators.average import AverageIteratesState, average_iterates, averaged_params
from cruxy_optax._actuators.centralize import centralize_kernels
from cruxy_optax._actuators.clip import clip_by_predicted_norm
from cruxy_optax._actuators.decay import add_controlled_decayed_weights
from cruxy_optax._actuators.directions import BlendSignState, blend_sign, soften_sign
from cruxy_optax._actuators.limit import limit_relative_step
from cruxy_optax._actuators.lora_pid import BlendByLoraPidState, blend_by_lora_pid
from cruxy_optax._actuators.moments import (
    ScaleByControlledAdamState,
    ScaleByControlledLionState,
    scale_by_controlled_adam,
    scale_by_controlled_lion,
    scale_by_controlled_momentum,
)
from cruxy_optax._actuators.orthogonal import orthogonalize_updates, scale_by_controlled_muon
from cruxy_optax._actuators.rate import (
    ScaleByMetaLearningRateState,
    ThrottleByPhaseState,
    scale_by_meta_learning_rate,
    throttle_by_phase,
)
from cruxy_optax._actuators.slices import BalanceSlicesState, balance_slices, scale_by_slices
from cruxy_optax._actuators.tiers import (
    ScaleByTiersState,
    TierPlan,
    retier,
    scale_by_tiers,
    tier_plan,
)
from cruxy_optax._actuators.trust import (
    ScaleByTrustRatioEmaState,
    clip_by_parameter_norm,
    clip_by_rms,
    scale_by_trust_ratio_ema,
)
from cruxy_optax._actuators.voted import (
    ScaleByVotedLionState,
    merge_votes,
    scale_by_voted_lion,
    vote_specs,
)
from cruxy_optax._diagnose import Diagnosis, diagnose
from cruxy_optax._distributed.compressed import (
    AverageGradientsState,
    WireBytes,
    average_gradients,
    compressed_pmean,
    wire_bytes,
)
from cruxy_optax._low_bit import BlockLayout, LowBitArray
from cruxy_optax._memory.activations import compressed_checkpoint
from cruxy_optax._memory.estimate import MemoryEstimate
from cruxy_optax._memory.quantize import QuantizeState, quantize_state
from cruxy_optax._memory.rounding import RoundUpdatesState, round_updates
from cruxy_optax._models.estimate import estimate_memory
from cruxy_optax._optimizers.axiom import axiom
from cruxy_optax._optimizers.cooldown import cooldown
from cruxy_optax._optimizers.cosmic import cosmic
from cruxy_optax._optimizers.meta3 import meta3, meta_lion
from cruxy_optax._optimizers.self_driving import (
    self_driving,
    self_driving_lion,
    self_driving_muon,
)
from cruxy_optax._optimizers.stability import stability_v1, stability_v2
from cruxy_optax._optimizers.tiger import tiger
from cruxy_optax._release import LayerStack, ReleasedStep, release_gradients
from cruxy_optax._roles.labels import label_roles, role_mask
from cruxy_optax._roles.layouts import qkv_slices
from cruxy_optax._roles.rates import scale_by_role
from cruxy_optax._roles.table import role_table
from cruxy_optax._sensors.observers import (
    TrackCurvatureState,
    TrackGammaNormState,
    track_curvature,
    track_gamma_norm,
)
from cruxy_optax._stabilize import StabilizeState, stabilize
from cruxy_optax._telemetry import explain, telemetry
from cruxy_optax._telemetry_log import ScalarWriter, TelemetryLog

__version__ = version()

__all__ = [
    "AverageGradientsState",
    "AverageIteratesState",
    "BalanceSlicesState",
    "BlendByLoraPidState",
    "BlendSignState",
    "BlockLayout",
    "Diagnosis",
    "LayerStack",
    "LowBitArray",
    "MemoryEstimate",
    "Meta3",
    "PlateauGuard",
    "QuantizeState",
    "ReleasedStep",
    "RoleRow",
    "RoleTable",
    "RoundUpdatesState",
    "ScalarWriter",
    "ScaleByControlledAdamState",
    "ScaleByControlledLionState",
    "ScaleByMetaLearningRateState",
    "ScaleByTiersState",
    "ScaleByTrustRatioEmaState",
    "ScaleByVotedLionState",
    "SelfDriving",
    "StabilityV1",
    "StabilityV2",
    "StabilizeState",
    "TelemetryLog",
    "ThrottleByPhaseState",
    "TierPlan",
    "TrackCurvatureState",
    "TrackGammaNormState",
    "WireBytes",
    "add_controlled_decayed_weights",
    "average_gradients",
    "average_iterates",
    "averaged_params",
    "axiom",
    "balance_slices",
    "blend_by_lora_pid",
    "blend_sign",
    "centralize_kernels",
    "clip_by_parameter_norm",
    "clip_by_predicted_norm",
    "clip_by_rms",
    "compressed_checkpoint",
    "compressed_pmean",
    "cooldown",
    "cosmic",
    "diagnose",
    "estimate_memory",
    "explain",
    "label_roles",
    "limit_relative_step",
    "merge_votes",
    "meta3",
    "meta_lion",
    "orthogonalize_updates",
    "qkv_slices",
    "quantize_state",
    "release_gradients",
    "retier",
    "role_mask",
    "role_table",
    "round_updates",
    "scale_by_controlled_adam",
    "scale_by_controlled_lion",
    "scale_by_controlled_momentum",
    "scale_by_controlled_muon",
    "scale_by_meta_learning_rate",
    "scale_by_role",
    "scale_by_slices",
    "scale_by_tiers",
    "scale_by_trust_ratio_ema",
    "scale_by_voted_lion",
    "self_driving",
    "self_driving_lion",
    "self_driving_muon",
    "soften_sign",
    "stability_v1",
    "stability_v2",
    "stabilize",
    "telemetry",
    "throttle_by_phase",
    "tier_plan",
    "tiger",
    "track_curvature",
    "track_gamma_norm",
    "vote_specs",
    "wire_bytes",
]
