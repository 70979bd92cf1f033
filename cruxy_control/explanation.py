"""What a controller does, said in sentences, from the numbers of its telemetry."""

import math
from collections.abc import Mapping
from typing import Any

from cruxy_control.controls import RUN_PHASES, SCHEDULE_SHARE

_PHASES = {
    "search": "The rate is still looked for",
    "trunk": "The rate is found and followed",
    "cooldown": "The run is ending: what was found is held, and the rate falls to 0",
    "end": "The run has ended: the rate is 0 and nothing moves",
}


def explain(values: Mapping[str, Any]) -> str:
    """Sentences that say where a run is, what sets its rate, and what was done to its gradient.

    Args:
        values: telemetry of one controller, plain numbers by name.

    Returns:
        Several sentences, the most important first.

    Examples:
        >>> from cruxy_control import explain
        >>> print(explain({"step": 0, "skipped_total": 0, "ok": True}))
        No step was taken yet.
    """
    if not values["step"] and not values["skipped_total"]:
        return "No step was taken yet."
    driven = "run_phase" in values
    said = [_skips(values), *(_driven(values) if driven else _steered(values)), _clip(values)]
    return " ".join(sentence for sentence in said if sentence)


def _skips(values: Mapping[str, Any]) -> str:
    if not values["ok"]:
        row = int(values["skipped_in_a_row"])
        return (
            f"The last step was skipped, since its gradient was not finite: {row} in a row, "
            f"{int(values['skipped_total'])} in all; nothing moved."
        )
    skipped = int(values["skipped_total"])
    return f"Skipped so far: {skipped}." if skipped else ""


def _driven(values: Mapping[str, Any]) -> list[str]:
    """Of a law that finds the rate."""
    phase = RUN_PHASES[int(values["run_phase"])]
    said = [f"{_PHASES[phase]} (step {int(values['step'])}, rate {_rate(values)})."]
    if phase != "end":
        said += [_schedule(values, phase), _what_binds(values, phase), _noise(values)]
    return said


def _schedule(values: Mapping[str, Any], phase: str) -> str:
    """What a schedule has left; whether the law obeys it only the law knows."""
    left = float(values["schedule_scale"])
    if not left < 1.0 or phase == "search" or float(values["limit_scale"]) == 0.0:
        return ""
    return (
        f"The schedule has left {left:.2f} of the highest rate that was set; below the law's "
        f"schedule_share of it, {SCHEDULE_SHARE:g} unless you have set another, it is obeyed."
    )


def _what_binds(values: Mapping[str, Any], phase: str) -> str:
    limit, schedule = float(values["limit_scale"]), float(values["schedule_scale"])
    alignment, steps = float(values["alignment"]), int(values["limited_steps"])
    agree = (
        f"gradients do not oppose the steps (alignment {alignment:.2f})"
        if alignment > 0.0
        else f"gradients oppose the steps a little (alignment {alignment:.2f})"
    )
    if limit == 0.0:
        return "The rate that was set is 0: nothing moves and nothing is learned."
    if limit < 1.0:
        own = f"The relative limit{_yielding(values)}, not the law, sets the rate of every tensor"
        return f"{own} and has for {steps} steps: {agree}."
    if phase == "cooldown":
        return ""
    obeyed = phase == "trunk" and schedule < SCHEDULE_SHARE
    return f"{'Where it is not, the law' if obeyed else 'The law'} sets the rate: {agree}."


def _yielding(values: Mapping[str, Any]) -> str:
    factor = float(values["limit_factor"])
    return f" (at {factor:.2f} of its value)" if factor < 1.0 else ""


def _noise(values: Mapping[str, Any]) -> str:
    """How the momentum compares with one of gradients that have nothing in common."""
    ratio = float(values["momentum_ratio"])
    # Not known, or that of clipped gradients.
    if not math.isfinite(ratio) or values["clip_scale"] < 1.0:
        return ""
    text = f"The momentum is {ratio:.2f} times as long as the gradient"
    decays = {float(v) for k, v in values.items() if k == "beta1" or k.startswith("beta1[")}
    if len(decays) != 1 or not 0.0 < (decay := decays.pop()) < 1.0:
        return f"{text}."
    noise = ((1.0 - decay) / (1.0 + decay)) ** 0.5
    return f"{text}; it would be {noise:.2f} if gradients had nothing in common."


def _steered(values: Mapping[str, Any]) -> list[str]:
    """Of a law that scales the rate that was set."""
    factors = {
        "slow factor": values.get("meta_scale"),
        "phase throttle": values.get("phase_scale"),
    }
    shown = [f"{name} {float(v):.3g}" for name, v in factors.items() if v is not None]
    by = f" ({', '.join(shown)})" if shown else ""
    return [f"The rate of step {int(values['step'])} is {_rate(values)}{by}."]


def _clip(values: Mapping[str, Any]) -> str:
    scale, norm = values.get("clip_scale"), values.get("grad_norm")
    if scale is None or norm is None or not float(scale) < 1.0:
        return ""
    return f"The gradient, {float(norm):.3g} long, was clipped to {float(scale):.2g} of that."


def _rate(values: Mapping[str, Any]) -> str:
    rates = [
        float(v)
        for k, v in values.items()
        if k == "learning_rate" or k.startswith("learning_rate[")
    ]
    if not rates:
        return "unknown"
    low, high = min(rates), max(rates)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
