"""Our optimizers in the comparison: the modes, Meta3 part by part, the paper's own settings."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from benchmarks._jax.optimizers import (
    GUARDED_PEERS,
    PEERS,
    Optimizer,
    matrices,
    warm_up_cosine,
)
from benchmarks._jax.optimizers import (
    SOURCES as PEER_SOURCES,
)
from benchmarks._jax.rivals import RIVALS, warm_up_linear
from benchmarks._jax.wired_optimizers import wired
from benchmarks._rates import STARTS, WEIGHT_DECAY
from cruxy_control import LoraPid, Meta3, PlateauGuard, SelfDriving, tagged
from cruxy_control.slices import blocks
from cruxy_control.usual import usual_law
from cruxy_optax import (
    averaged_params,
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
    telemetry,
    throttle_by_phase,
    tiger,
)

SOURCES = (
    *PEER_SOURCES,
    "benchmarks/_jax/our_optimizers.py",
    "benchmarks/_jax/rivals.py",
    *("cruxy_control/**/*.py", "cruxy_exact/**/*.py", "cruxy_optax/**/*.py"),
)


def _skips(state: Any) -> Any:
    return telemetry(state)["skipped_total"]


def _controlled(
    make: Callable[..., Any], label: str, scale: float = 1.0, **options: Any
) -> Optimizer:
    def build(rate: Any, steps: int) -> optax.GradientTransformation:
        return make(rate, **{"weight_decay": WEIGHT_DECAY, "mask": matrices} | options)

    default = 1e-3 * scale
    return Optimizer(label, build, scale, skipped=_skips, default=default, sources=SOURCES)


def _driving(make: Callable[..., Any], label: str, **options: Any) -> Optimizer:
    averages = options.get("averaging", 0) is not None
    entry = _controlled(make, label, **options)._replace(grid=STARTS)
    return entry._replace(averaged=averaged_params) if averages else entry


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


def _without(label: str, **changes: Any) -> Optimizer:
    """Meta3 with constants of its law changed."""
    return _controlled(meta3, f"Meta3 without {label}", law=dataclasses.replace(Meta3(), **changes))


def _varied(label: str, *, law: dict[str, Any] | None = None, **options: Any) -> Optimizer:
    """Self-driving with a constant of its law or an option changed."""
    if law:
        options["law"] = dataclasses.replace(SelfDriving(), **law)
    return _driving(self_driving, f"Self-driving, {label}", **options)


CONTROLLED = {
    "meta3": _controlled(meta3, "Meta3"),
    "meta_lion": _controlled(meta_lion, "Meta-Lion", scale=0.1),
    "stability_v1": _controlled(stability_v1, "Stability v1"),
    "stability_v2": _controlled(stability_v2, "Stability v2"),
}
"""Ours."""

ABLATION = {
    "meta3-no-phase-rate": _without("phase throttle of the rate", phase_strength=0.0),
    "meta3-no-phase-beta2": _without("phase throttle of beta2", beta2_phase_strength=0.0),
    "meta3-no-meta-rate": _without("meta rate", rate_gain=0.0),
    "meta3-no-meta-beta2": _without("meta beta2", beta2_gain=0.0),
    "meta3-no-curvature": _without("curvature", beta1_gain=0.0),
    "meta3-no-clip": _without("predictive clip", clip_threshold=None),
    "meta3-no-debias": _without("debias", debias=False),
    "meta3-no-nesterov": _controlled(meta3, "Meta3 without Nesterov", nesterov=False),
}
"""Meta3 with one part removed each."""

FEW_STARTS = (1e-5, 1e-3, 1e-1)
"""Where those start that are compared with tuned optimizers alone."""


def _muon_at(set_point: float) -> Optimizer:
    """Self-driving Muon that is steered to one alignment all along."""
    law = usual_law("muon", ends=False, interpolation=0.7)
    law = dataclasses.replace(law, set_point=set_point, excess_share=None)
    label = f"Self-driving Muon, set point {set_point:g}"
    return _driving(self_driving_muon, label, interpolation=0.7, law=law)._replace(grid=FEW_STARTS)


SELF_DRIVING = {
    "self_driving": _driving(self_driving, "Self-driving"),
    "self_driving-lion": _driving(self_driving_lion, "Self-driving Lion")._replace(default=1e-4),
    "self_driving-muon": _driving(self_driving_muon, "Self-driving Muon")._replace(grid=FEW_STARTS),
    "self_driving-no-average": _driving(
        self_driving, "Self-driving without average", averaging=None
    ),
    "self_driving-interpolated": _driving(
        self_driving, "Self-driving, interpolation 0.6", interpolation=0.6
    )._replace(grid=FEW_STARTS),
    "self_driving-muon-plain": _driving(
        self_driving_muon, "Self-driving Muon, no interpolation", interpolation=0.0
    )._replace(grid=FEW_STARTS),
    "self_driving-muon-fixed": _muon_at(-0.07),
    "self_driving-muon-set-0": _muon_at(0.0),
}
"""Ours without a rate; the grid is where they start."""


def _ended(make: Callable[..., Any], label: str, **options: Any) -> Optimizer:
    """Self-driving that is told when the run ends."""

    def build(rate: Any, steps: int) -> optax.GradientTransformation:
        defaults = {"weight_decay": WEIGHT_DECAY, "mask": matrices, "total_steps": steps}
        return make(rate, **defaults | options)

    return _driving(make, f"{label}, known end")._replace(make=build, grid=FEW_STARTS)


def _falling(make: Callable[..., Any], label: str) -> Optimizer:
    """Self-driving under a schedule of the user's, which it obeys once it has found its rate."""

    def build(rate: Any, steps: int) -> optax.GradientTransformation:
        schedule = optax.schedules.linear_schedule(1.0, 0.0, steps)
        return make(lambda n: rate * schedule(n), weight_decay=WEIGHT_DECAY, mask=matrices)

    return _driving(make, f"{label}, linear to 0")._replace(make=build, grid=FEW_STARTS)


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
    "self_driving-embedding-third": _driving(
        self_driving, "Self-driving, embedding / 3", rates={"embedding": 1 / 3}
    ),
    "self_driving-norm-thrice": _driving(
        self_driving, "Self-driving, norm x 3", rates={"norm": 3.0}
    ),
    "self_driving-embedding-third-norm-thrice": _driving(
        self_driving, "Self-driving, both", rates={"embedding": 1 / 3, "norm": 3.0}
    ),
    "self_driving-head-third": _driving(
        self_driving, "Self-driving, head / 3", rates={"head": 1 / 3}
    ),
    "self_driving-lora-plus": _driving(self_driving, "Self-driving, LoRA+", rates={"lora.b": 16.0}),
    "self_driving-ended-embedding-third": _ended(
        self_driving, "Self-driving, embedding / 3", rates={"embedding": 1 / 3}
    ),
    "self_driving-muon-embedding-third": _driving(
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

VARIED = {
    "self_driving-no-steering": _varied("the rate held where it starts", law={"gain": 0.0}),
    "self_driving-no-limit": _varied("no relative limit", relative_limit=None),
    "self_driving-no-average": SELF_DRIVING["self_driving-no-average"],
    "self_driving-no-clip": _varied("no predictive clip", law={"clip_threshold": None}),
    "self_driving-no-nesterov": _varied("no Nesterov", nesterov=False),
    "self_driving-set-point-0.2": _varied("set point -0.2", law={"set_point": -0.2}),
    "self_driving-set-point-0.3": _varied("set point -0.3", law={"set_point": -0.3}),
    "self_driving-gain-0.5": _varied("gain 0.5", law={"gain": 0.5}),
    "self_driving-gain-2": _varied("gain 2", law={"gain": 2.0}),
    "self_driving-time-10": _varied("gain time 10", law={"gain_time": 10.0}),
    "self_driving-time-40": _varied("gain time 40", law={"gain_time": 40.0}),
    "self_driving-decay-0.8": _varied("alignment decay 0.8", law={"alignment_decay": 0.8}),
    "self_driving-decay-0.95": _varied("alignment decay 0.95", law={"alignment_decay": 0.95}),
    "self_driving-limit-0.03": _varied("relative limit 0.03", relative_limit=0.03),
    "self_driving-limit-0.05": _varied("relative limit 0.05", relative_limit=0.05),
    "self_driving-limit-0.2": _varied("relative limit 0.2", relative_limit=0.2),
    "self_driving-limit-holds": _varied("a limit that holds", law={"limit_yield": None}),
    "self_driving-power-8": _varied("averaging power 8", averaging=8.0),
    "self_driving-power-32": _varied("averaging power 32", averaging=32.0),
    "self_driving-b2-0.999": _varied("b2 0.999", b2=0.999),
}
"""Self-driving with one part removed or one constant changed each."""


def _yielding(kind: str, steps: float | None) -> Optimizer:
    """Self-driving of a kind whose limit gives way after so many steps, or holds."""
    make, label = {
        "adam": (self_driving, "Self-driving"),
        "lion": (self_driving_lion, "Self-driving Lion"),
        "muon": (self_driving_muon, "Self-driving Muon"),
    }[kind]
    law = dataclasses.replace(usual_law(kind, ends=False), limit_yield=steps)
    how = "limit that holds" if steps is None else f"limit that yields, {steps:g}"
    return _driving(make, f"{label}, {how}", law=law)


YIELDING = {
    "self_driving-held": _yielding("adam", None),
    "self_driving-yield-20": _yielding("adam", 20.0),
    "self_driving-yield-50": _yielding("adam", 50.0),
    "self_driving-lion-held": _yielding("lion", None),
    "self_driving-lion-yield-50": _yielding("lion", 50.0),
    "self_driving-muon-held": _yielding("muon", None),
    "self_driving-muon-yield-50": _yielding("muon", 50.0),
}
"""Self-driving with a relative limit that gives way where nothing opposes the steps, or holds."""

AVERAGED = {
    f"{name}-average-{bits}bit": _driving(
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

    return _controlled(make, f"Meta3, {label}", **options)


def _tiger(label: str, **options: Any) -> Optimizer:
    return _controlled(tiger, f"Tiger, {label}" if label else "Tiger", 0.1, **options)


_SLICES = {"*.attention_in.kernel": blocks(64, 64, 64, axis=1)}
"""Where q, k and v lie in the small GPT."""

COMPONENTS = {
    "meta3-tiger-rates": _with("rates by role", scale_by_role(tagged.RATES)),
    "meta3-slices": _with("rates of slices", scale_by_slices(_SLICES, tagged.SLICE_RATES)),
    "meta3-balanced-slices": _with("balanced slices", balance_slices(_SLICES)),
    "meta3-agc": _with("adaptive gradient clip", before=(clip_by_parameter_norm(0.02),)),
    "meta3-clip-rms": _with("RMS clip", clip_by_rms(1.0)),
    "meta3-trust": _with("trust ratio", scale_by_trust_ratio_ema(10.0)),
    "meta3-guard": _controlled(meta3, "Meta3, plateau guard", law=PlateauGuard(Meta3())),
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
    "axiom-half-power": _controlled(axiom, "AXIOM, power 1/2", power=0.5, relative_step=True),
    "axiom-relative": _controlled(axiom, "AXIOM, relative steps", relative_step=True),
}
"""Tiger's components, each added to Meta3, to Tiger without it, or to AXIOM."""

COMPACT = {
    "meta_lion-bfloat16": _controlled(meta_lion, "Meta-Lion, bfloat16", 0.1, mu_dtype=jnp.bfloat16),
    "meta3-8bit": _controlled(meta3, "Meta3, 8 bits", state_bits=8),
    "meta3-4bit": _controlled(meta3, "Meta3, 4 bits", state_bits=4),
    "meta_lion-8bit": _controlled(meta_lion, "Meta-Lion, 8 bits", 0.1, state_bits=8),
    "meta_lion-4bit": _controlled(meta_lion, "Meta-Lion, 4 bits", 0.1, state_bits=4),
    "axiom": _controlled(axiom, "AXIOM"),
    "axiom-momentum": _controlled(axiom, "AXIOM, 4-bit momentum", b1=0.9),
    "cosmic-256KB": _controlled(cosmic, "COSMIC, 256 KB", state_budget="256KB"),
}
"""Ours with a smaller state."""

# Section 5 of the paper: Meta-Lion with its own betas, centralized gradients and more decay.
PUBLISHED = {
    "meta_lion-paper": _controlled(
        meta_lion, "Meta-Lion, as published", 0.1, weight_decay=0.2, centralize=True
    ),
}
"""The paper's own settings where they are not the registry's."""

WIRED = wired(SOURCES, _skips)
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
    | YIELDING
    | AVERAGED
    | PUBLISHED
    | WIRED
)
"""Every optimizer by name."""
