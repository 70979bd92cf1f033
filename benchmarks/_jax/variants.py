"""Ours with one part removed, or one constant changed, at a time."""

import dataclasses
from typing import Any

from benchmarks._jax.entries import FEW_STARTS, controlled, driving
from benchmarks._jax.optimizers import Optimizer
from cruxy_control import Meta3, SelfDriving
from cruxy_control.usual import USUAL, usual_law
from cruxy_optax import meta3, self_driving, self_driving_lion, self_driving_muon


def _without(label: str, **changes: Any) -> Optimizer:
    """Meta3 with constants of its law changed."""
    return controlled(meta3, f"Meta3 without {label}", law=dataclasses.replace(Meta3(), **changes))


def _varied(label: str, *, law: dict[str, Any] | None = None, **options: Any) -> Optimizer:
    """Self-driving with a constant of its law or an option changed."""
    if law:
        options["law"] = dataclasses.replace(SelfDriving(), **law)
    return driving(self_driving, f"Self-driving, {label}", **options)


def _varied_muon(label: str, *, law: dict[str, Any] | None = None, **options: Any) -> Optimizer:
    """Self-driving Muon with a constant of its law or an option changed."""
    if law:
        pull = USUAL["muon"].interpolation
        usual = usual_law("muon", ends=False, interpolation=pull)
        options |= {"interpolation": pull, "law": dataclasses.replace(usual, **law)}
    entry = driving(self_driving_muon, f"Self-driving Muon, {label}", **options)
    return entry._replace(grid=FEW_STARTS)


ABLATION = {
    "meta3-no-phase-rate": _without("phase throttle of the rate", phase_strength=0.0),
    "meta3-no-phase-beta2": _without("phase throttle of beta2", beta2_phase_strength=0.0),
    "meta3-no-meta-rate": _without("meta rate", rate_gain=0.0),
    "meta3-no-meta-beta2": _without("meta beta2", beta2_gain=0.0),
    "meta3-no-curvature": _without("curvature", beta1_gain=0.0),
    "meta3-no-clip": _without("predictive clip", clip_threshold=None),
    "meta3-no-debias": _without("debias", debias=False),
    "meta3-no-nesterov": controlled(meta3, "Meta3 without Nesterov", nesterov=False),
}
"""Meta3 with one part removed each."""

VARIED = {
    "self_driving-no-steering": _varied("the rate held where it starts", law={"gain": 0.0}),
    "self_driving-no-limit": _varied("no relative limit", relative_limit=None),
    "self_driving-no-average": driving(
        self_driving, "Self-driving without average", averaging=None
    ),
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

VARIED_MUON = {
    "self_driving-muon-plain": _varied_muon("no interpolation", interpolation=0.0),
    "self_driving-muon-fixed": _varied_muon("set point -0.07", law={"excess_share": None}),
    "self_driving-muon-set-0": _varied_muon(
        "set point 0", law={"set_point": 0.0, "excess_share": None}
    ),
    "self_driving-muon-share-0.25": _varied_muon("excess share 0.25", law={"excess_share": 0.25}),
    "self_driving-muon-share-1": _varied_muon("excess share 1", law={"excess_share": 1.0}),
    "self_driving-muon-time-10": _varied_muon("gain time 10", law={"gain_time": 10.0}),
    "self_driving-muon-time-40": _varied_muon("gain time 40", law={"gain_time": 40.0}),
    "self_driving-muon-limit-0.1": _varied_muon("relative limit 0.1", relative_limit=0.1),
    "self_driving-muon-limit-0.3": _varied_muon("relative limit 0.3", relative_limit=0.3),
    "self_driving-muon-pull-0.5": _varied_muon("interpolation 0.5", interpolation=0.5),
    "self_driving-muon-pull-0.8": _varied_muon("interpolation 0.8", interpolation=0.8),
    "self_driving-muon-power-4": _varied_muon(
        "averaging power 4", averaging=4.0, interpolation=0.7
    ),
    "self_driving-muon-no-nesterov": _varied_muon("no Nesterov", nesterov=False),
    "self_driving-muon-b1-0.95": _varied_muon("momentum 0.95", b1=0.95),
}
"""Self-driving Muon with one part removed or one constant changed each."""


def _yielding(kind: str, steps: float | None) -> Optimizer:
    """Self-driving of a kind whose limit gives way after so many steps, or holds."""
    make, label = {
        "adam": (self_driving, "Self-driving"),
        "lion": (self_driving_lion, "Self-driving Lion"),
        "muon": (self_driving_muon, "Self-driving Muon"),
    }[kind]
    law = dataclasses.replace(usual_law(kind, ends=False), limit_yield=steps)
    how = "limit that holds" if steps is None else f"limit that yields, {steps:g}"
    return driving(make, f"{label}, {how}", law=law)


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
