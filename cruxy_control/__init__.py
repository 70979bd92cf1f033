"""The control law: pure scalar maths, standard library only, written once.

A law is a frozen config with `init(like, *, xp) -> state` and
`step(state, signals, *, xp) -> (state, controls)`, where `xp` is `numpy`, `jax.numpy` or `torch`.
"WP n" is equation n of the Cruxy Stability Engine White Paper v2.1, "v2.0 n" one of the earlier
white paper, known through the constants of the Apache-2.0 package `cruxy` 2.1.0.
"""

from cruxy_control.controls import RUN_PHASES, Controls, betas, meta_learning_rate
from cruxy_control.explanation import explain
from cruxy_control.law import Law
from cruxy_control.lora_pid import LoraPid, LoraPidState, large_share
from cruxy_control.meta3 import Meta3, Meta3State
from cruxy_control.plateau import PlateauGuard, PlateauGuardState
from cruxy_control.self_driving import SelfDriving, SelfDrivingState
from cruxy_control.sensing import SensorState, V2Sensors
from cruxy_control.signals import Signals
from cruxy_control.stability_v1 import StabilityV1, StabilityV1State
from cruxy_control.stability_v2 import StabilityV2, StabilityV2State

__all__ = [
    "RUN_PHASES",
    "Controls",
    "Law",
    "LoraPid",
    "LoraPidState",
    "Meta3",
    "Meta3State",
    "PlateauGuard",
    "PlateauGuardState",
    "SelfDriving",
    "SelfDrivingState",
    "SensorState",
    "Signals",
    "StabilityV1",
    "StabilityV1State",
    "StabilityV2",
    "StabilityV2State",
    "V2Sensors",
    "betas",
    "explain",
    "large_share",
    "meta_learning_rate",
]
