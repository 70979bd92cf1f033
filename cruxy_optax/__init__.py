"""The Cruxy Stability Engine for JAX: optimizers and composable gradient transformations."""

from cruxy_control import Meta3, StabilityV1, StabilityV2
from cruxy_optax._alias import meta3, meta_lion, stability_v1, stability_v2
from cruxy_optax._centralize import centralize_kernels
from cruxy_optax._clip import clip_by_predicted_norm
from cruxy_optax._moments import (
    ScaleByControlledAdamState,
    ScaleByControlledLionState,
    scale_by_controlled_adam,
    scale_by_controlled_lion,
)
from cruxy_optax._rate import (
    ScaleByMetaLearningRateState,
    ThrottleByPhaseState,
    scale_by_meta_learning_rate,
    throttle_by_phase,
)
from cruxy_optax._sensors import (
    TrackCurvatureState,
    TrackGammaNormState,
    track_curvature,
    track_gamma_norm,
)
from cruxy_optax._stabilize import StabilizeState, stabilize
from cruxy_optax._telemetry import telemetry
from cruxy_optax._telemetry_log import ScalarWriter, TelemetryLog

__all__ = [
    "Meta3",
    "ScalarWriter",
    "ScaleByControlledAdamState",
    "ScaleByControlledLionState",
    "ScaleByMetaLearningRateState",
    "StabilityV1",
    "StabilityV2",
    "StabilizeState",
    "TelemetryLog",
    "ThrottleByPhaseState",
    "TrackCurvatureState",
    "TrackGammaNormState",
    "centralize_kernels",
    "clip_by_predicted_norm",
    "meta3",
    "meta_lion",
    "scale_by_controlled_adam",
    "scale_by_controlled_lion",
    "scale_by_meta_learning_rate",
    "stability_v1",
    "stability_v2",
    "stabilize",
    "telemetry",
    "throttle_by_phase",
    "track_curvature",
    "track_gamma_norm",
]
