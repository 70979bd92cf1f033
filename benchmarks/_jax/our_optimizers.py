"""Our optimizers in the comparison: the modes, Tiger's parts, the paper's own settings."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from benchmarks._jax.entries import FEW_STARTS, SOURCES, controlled, driving, skips
from benchmarks._jax.optimizers import (
    GUARDED_PEERS,
    PEERS,
    Optimizer,
    matrices,
    warm_up_cosine,
)
from benchmarks._jax.rivals import RIVALS, warm_up_linear
from benchmarks._jax.variants import ABLATION, VARIED, VARIED_MUON, YIELDING
from benchmarks._jax.wired_optimizers import wired
from benchmarks._rates import WEIGHT_DECAY
from cruxy_control import LoraPid, Meta3, PlateauGuard, SelfDriving, tagged
from cruxy_control.slices import blocks
from cruxy_optax import (
    axiom,
    balance_slices,
    clip_by_parameter_norm,
    clip_by_predicted_norm,
    clip_by_rms,
    cosmic,
    meta3,
    meta_lion,
    scale_by_controlled_adam,
    scale_by_meta_learning_rate,
    scale_by_role,
    scale_by_slices,
    scale_by_trust_ratio_ema,
    self_driving,
    self_driving_lion,
    self_driving_muon,
    stability_v1,
    stability_v2,
    stabilize,
    throttle_by_phase,
    tiger,
)

Schedule = Callable[[Any, int], optax.Schedule]


def _scheduled(schedule: Schedule) -> Callable[[Any, int], optax.GradientTransformation]:
    """The AdamW inside `self_driving`, as it is usually trained: a clip, a warm-up and a decay."""

    def make(rate: Any, steps: int) -> optax.GradientTransformation:
        adamw = optax.adamw(
            *(schedule(rate, steps), 0.9, 0.99),
            weight_decay=WEIGHT_DECAY,
            mask=matrices,
            nesterov=True,
        )
        return optax.chain(optax.clip_by_global_norm(1.5), adamw)

    return make


CONTROLLED = {
    "meta3": controlled(meta3, "Meta3"),
    "meta_lion": controlled(meta_lion, "Meta-Lion", scale=0.1),
    "stability_v1": controlled(stability_v1, "Stability v1"),
    "stability_v2": controlled(stability_v2, "Stability v2"),
}
"""Ours."""

SELF_DRIVING = {
    "self_driving": driving(self_driving, "Self-driving"),
    "self_driving-lion": driving(self_driving_lion, "Self-driving Lion")._replace(default=1e-4),
    "self_driving-muon": driving(self_driving_muon, "Self-driving Muon")._replace(grid=FEW_STARTS),
    "self_driving-no-average": VARIED["self_driving-no-average"],
    "self_driving-interpolated": driving(
        self_driving, "Self-driving, interpolation 0.6", interpolation=0.6
    )._replace(grid=FEW_STARTS),
}
"""Ours without a rate; the grid is where they start."""


def _ended(make: Callable[..., Any], label: str, **options: Any) -> Optimizer:
    """Self-driving that is told when the run ends."""

    def build(rate: Any, steps: int) -> optax.GradientTransformation:
        defaults = {"weight_decay": WEIGHT_DECAY, "mask": matrices, "total_steps": steps}
        return make(rate, **defaults | options)

    return driving(make, f"{label}, known end")._replace(make=build, grid=FEW_STARTS)


def _falling(make: Callable[..., Any], label: str) -> Optimizer:
    """Self-driving under a schedule of the user's, which it obeys once it has found its rate."""

    def build(rate: Any, steps: int) -> optax.GradientTransformation:
        schedule = optax.schedules.linear_schedule(1.0, 0.0, steps)
        return make(lambda n: rate * schedule(n), weight_decay=WEIGHT_DECAY, mask=matrices)

    return driving(make, f"{label}, linear to 0")._replace(make=build, grid=FEW_STARTS)


ENDED = {
    "self_driving-ended": _ended(self_driving, "Self-driving"),
    "self_driving-lion-ended": _ended(self_driving_lion, "Self-driving Lion")._replace(
        default=1e-4
    ),
    "self_driving-muon-ended": _ended(self_driving_muon, "Self-driving Muon"),
    "self_driving-linear": _falling(self_driving, "Self-driving"),
    "self_driving-muon-linear": _falling(self_driving_muon, "Self-driving Muon"),
}
"""The same, told when the run ends or given a schedule."""

ROLES = {
    "self_driving-embedding-third": driving(
        self_driving, "Self-driving, embedding / 3", rates={"embedding": 1 / 3}
    ),
    "self_driving-norm-thrice": driving(
        self_driving, "Self-driving, norm x 3", rates={"norm": 3.0}
    ),
    "self_driving-embedding-third-norm-thrice": driving(
        self_driving, "Self-driving, both", rates={"embedding": 1 / 3, "norm": 3.0}
    ),
    "self_driving-head-third": driving(
        self_driving, "Self-driving, head / 3", rates={"head": 1 / 3}
    ),
    "self_driving-lora-plus": driving(self_driving, "Self-driving, LoRA+", rates={"lora.b": 16.0}),
    "self_driving-ended-embedding-third": _ended(
        self_driving, "Self-driving, embedding / 3", rates={"embedding": 1 / 3}
    ),
    "self_driving-muon-embedding-third": driving(
        self_driving_muon, "Self-driving Muon, embedding / 3", rates={"embedding": 1 / 3}
    ),
    "self_driving-muon-ended-embedding-third": _ended(
        self_driving_muon, "Self-driving Muon, embedding / 3", rates={"embedding": 1 / 3}
    ),
}
"""Self-driving with rates by role."""


def _scheduled_muon(schedule: Schedule) -> Callable[[Any, int], optax.GradientTransformation]:
    """Likewise the Muon inside `self_driving_muon`."""
    return lambda rate, steps: self_driving_muon(
        schedule(rate, steps),
        weight_decay=WEIGHT_DECAY,
        relative_limit=None,
        averaging=None,
        law=SelfDriving(gain=0.0),
    )


SCHEDULED = {
    name: Optimizer(label, make, sources=SOURCES)
    for name, label, make in (
        ("scheduled", "Self-driving's AdamW, cosine", _scheduled(warm_up_cosine)),
        ("scheduled-linear", "Self-driving's AdamW, linear", _scheduled(warm_up_linear)),
        ("scheduled-muon", "Self-driving's Muon, cosine", _scheduled_muon(warm_up_cosine)),
        ("scheduled-muon-linear", "Self-driving's Muon, linear", _scheduled_muon(warm_up_linear)),
    )
}
"""What self-driving does without its controller, under a schedule that has to be tuned."""

AVERAGED = {
    f"{name}-average-{bits}bit": driving(
        make, f"{label}, average in {bits} bits", average_bits=bits
    )
    for name, make, label in (
        ("self_driving", self_driving, "Self-driving"),
        ("self_driving-lion", self_driving_lion, "Self-driving Lion"),
        ("self_driving-muon", self_driving_muon, "Self-driving Muon"),
    )
    for bits in (16, 8)
}
"""Self-driving with an average in fewer bits."""


def _with(label: str, *parts: Any, before: tuple[Any, ...] = (), **options: Any) -> Optimizer:
    """Meta3's chain with parts behind the direction, or before it."""

    def make(rate: Any, **given: Any) -> optax.GradientTransformation:
        return stabilize(
            optax.chain(
                clip_by_predicted_norm(),
                *before,
                scale_by_controlled_adam(),
                *parts,
                optax.add_decayed_weights(given["weight_decay"], given["mask"]),
                throttle_by_phase(),
                scale_by_meta_learning_rate(rate),
            ),
            law=Meta3(),
        )

    return controlled(make, f"Meta3, {label}", **options)


def _tiger(label: str, **options: Any) -> Optimizer:
    return controlled(tiger, f"Tiger, {label}" if label else "Tiger", 0.1, **options)


_SLICES = {"*.attention_in.kernel": blocks(64, 64, 64, axis=1)}
"""Where q, k and v lie in the small GPT."""

COMPONENTS = {
    "meta3-tiger-rates": _with("rates by role", scale_by_role(tagged.RATES)),
    "meta3-slices": _with("rates of slices", scale_by_slices(_SLICES, tagged.SLICE_RATES)),
    "meta3-balanced-slices": _with("balanced slices", balance_slices(_SLICES)),
    "meta3-agc": _with("adaptive gradient clip", before=(clip_by_parameter_norm(0.02),)),
    "meta3-clip-rms": _with("RMS clip", clip_by_rms(1.0)),
    "meta3-trust": _with("trust ratio", scale_by_trust_ratio_ema(10.0)),
    "meta3-guard": controlled(meta3, "Meta3, plateau guard", law=PlateauGuard(Meta3())),
    "meta3-lora-plus": _with("LoRA+", scale_by_role({"lora.b": 16.0})),
    "tiger": _tiger(""),
    "tiger-soft": _tiger("soft sign", temperature=1.0),
    "tiger-no-blend": _tiger("no blend", blend=0.0),
    "tiger-trust": _tiger("trust ratio", trust_cap=10.0),
    "tiger-momentum-trust": _tiger(
        "trust ratio to the momentum", trust_cap=10.0, trust_space="momentum"
    ),
    "tiger-half-power": _tiger("power 1/2", power=0.5),
    "tiger-agc": _tiger("adaptive gradient clip", agc=0.02),
    "tiger-slices": _tiger("rates of slices", slices=_SLICES, slice_rates=tagged.SLICE_RATES),
    "tiger-balanced-slices": _tiger("balanced slices", slices=_SLICES, balance_slices=True),
    "tiger-rates": _tiger("rates by role", role_rates=tagged.RATES),
    "tiger-guard": _tiger("plateau guard", law=PlateauGuard(Meta3())),
    "tiger-lora-pid": _tiger("LoRA-PID", lora_pid=LoraPid()),
    "tiger-lora-plus": _tiger("LoRA+", role_rates={"lora.b": 16.0}),
    "axiom-half-power": controlled(axiom, "AXIOM, power 1/2", power=0.5, relative_step=True),
    "axiom-relative": controlled(axiom, "AXIOM, relative steps", relative_step=True),
}
"""Tiger's components, each added to Meta3, to Tiger without it, or to AXIOM."""

COMPACT = {
    "meta_lion-bfloat16": controlled(meta_lion, "Meta-Lion, bfloat16", 0.1, mu_dtype=jnp.bfloat16),
    "meta3-8bit": controlled(meta3, "Meta3, 8 bits", state_bits=8),
    "meta3-4bit": controlled(meta3, "Meta3, 4 bits", state_bits=4),
    "meta_lion-8bit": controlled(meta_lion, "Meta-Lion, 8 bits", 0.1, state_bits=8),
    "meta_lion-4bit": controlled(meta_lion, "Meta-Lion, 4 bits", 0.1, state_bits=4),
    "axiom": controlled(axiom, "AXIOM"),
    "axiom-momentum": controlled(axiom, "AXIOM, 4-bit momentum", b1=0.9),
    "cosmic-256KB": controlled(cosmic, "COSMIC, 256 KB", state_budget="256KB"),
}
"""Ours with a smaller state."""

# Section 5 of the paper: Meta-Lion with its own betas, centralized gradients and more decay.
PUBLISHED = {
    "meta_lion-paper": controlled(
        meta_lion, "Meta-Lion, as published", 0.1, weight_decay=0.2, centralize=True
    ),
}
"""The paper's own settings where they are not the registry's."""

WIRED = wired(SOURCES, skips)
"""Ours, and plain Lion, on four workers with a compressed wire."""

OPTIMIZERS: dict[str, Any] = (
    CONTROLLED
    | SELF_DRIVING
    | ENDED
    | ROLES
    | SCHEDULED
    | COMPACT
    | PEERS
    | GUARDED_PEERS
    | RIVALS
    | COMPONENTS
    | ABLATION
    | VARIED
    | VARIED_MUON
    | YIELDING
    | AVERAGED
    | PUBLISHED
    | WIRED
)
"""Every optimizer by name."""
