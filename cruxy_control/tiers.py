"""Tiered optimizer state under a byte budget: which tensor may keep how much.

A tensor is at one of three tiers: the sign of its gradient and no state of its own (0), one scalar
(1), or momentum and second moment (2). The plan is made on the host between steps, from two
averages that every tensor pays for; the two formulas at the end run inside the step and take the
array namespace as `xp`.
"""

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cruxy_control import filters
from cruxy_control.checks import check_range

SIGN, SCALAR, MOMENTS = TIERS = (0, 1, 2)

SCALAR_SHARE = 0.1
"""The part of the benefit of both moments that one scalar is credited with. It costs 4 bytes
whatever the size of its tensor, so any share above about 0 puts it first; this one says that
moments are the goal."""

SIGN_STEP = 0.2
"""Size of a sign in each coordinate: about the root mean square of an update of Adam's, so that one
learning rate serves all tiers. AdamW's has been seen between 0.2 and 0.4 ([arXiv
2502.16982](https://arxiv.org/abs/2502.16982), section 2.2)."""

GATE_FLOOR = 0.1
"""No tensor is gated down to less than this part of its step."""

SCALE_BOUNDS = (0.5, 2.0)
"""Bounds of the scale of a tensor at tier 1."""

FAST_DECAY, SLOW_DECAY = 0.9, 0.999
"""Decays of the two averages of a gradient's size (WP 2, 3)."""

_UNITS = {"": 1, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(name: str, value: int | str) -> int:
    """A number of bytes, from a whole number or a text such as `"64MB"`.

    Args:
        name: the argument as the user wrote it.
        value: bytes; or a number with the unit B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB,
            TiB (powers of 1024), upper or lower case, with or without a space. What is left of a
            byte is dropped.

    Returns:
        Bytes, at least 0.

    Raises:
        ValueError: where the text is no such size, or the number is negative.
        TypeError: where it is neither a whole number nor a text.

    Examples:
        >>> parse_bytes("state_budget", "64MB"), parse_bytes("state_budget", "1.5 KiB")
        (64000000, 1536)
    """
    remedy = "give bytes, as 64_000_000, or a text such as '64MB' or '0.5 GiB'"
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?)(I?)B?", value.strip().upper())
        if match is None or (match[3] and not match[2]):
            raise ValueError(f"{name} must be a size in bytes, got {value!r}; {remedy}.")
        scale = 1 if not match[2] else (1024 if match[3] else 1000) ** _UNITS[match[2]]
        return int(float(match[1]) * scale)
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be a size in bytes, got {value!r}; {remedy}.")
    check_range(name, value, 0.0, remedy=remedy)
    return int(value)


class Candidate(NamedTuple):
    """A tensor that asks for state.

    Attributes:
        name: its path, unique.
        size: elements.
        bytes: of its own state at tier 0, 1 and 2, never falling; what all tensors pay for
            anyway, such as the averages below, belongs to the fixed bytes of the plan.
        rms: root mean square of its gradient, averaged over the last steps; 1 for every tensor as
            long as nothing has been seen.
    """

    name: str
    size: int
    bytes: tuple[int, int, int]
    rms: float


def fill(
    candidates: Sequence[Candidate],
    budget: int,
    *,
    fixed: int,
    current: Mapping[str, int] | None = None,
    hysteresis: float = 0.2,
) -> dict[str, int]:
    """The tier of every tensor: greedy by benefit per byte, never above the budget.

    Moments are worth `size * rms` to a tensor, a scalar a tenth of that: to first order a step of
    the size of the rate in each coordinate lowers the loss by the sum of `|g|`, and the root mean
    square counts more where few coordinates carry the gradient, which is where a sign serves worst.
    Promotions are taken in the order of benefit per byte; one that does not fit is passed over,
    smaller ones after it may still fit. Equal promotions go to the smaller tensor, then by name, so
    equal input gives equal plans.

    What a tensor holds already counts `1 + hysteresis` times, so a newcomer has to be clearly
    better; on unchanged averages a plan returns itself.

    Args:
        candidates: all tensors.
        budget: bytes of state in all.
        fixed: bytes of state that no plan changes.
        current: tier by name as it is now, `None` at the start.
        hysteresis: at least 0.

    Returns:
        Tier by name, in the order of `candidates`.

    Raises:
        ValueError: where even the lowest tier of every tensor does not fit; the message says what
            would.

    Examples:
        >>> small, large = Candidate("b", 8, (0, 4, 64), 1.0), Candidate("w", 64, (0, 4, 512), 1.0)
        >>> fill([large, small], 100, fixed=20)
        {'w': 1, 'b': 2}
    """
    check_range("hysteresis", hysteresis, 0.0, remedy="0.2 keeps what is nearly as good")
    used = smallest_budget(candidates, fixed=fixed)
    if used > budget:
        raise ValueError(
            f"state_budget must be at least {used:,} bytes for these {len(candidates)} tensors, "
            f"which every tensor at tier 0 takes, got {budget:,}; give that much or more."
        )
    promotions = []
    for candidate in candidates:
        held = SIGN if current is None else current.get(candidate.name, SIGN)
        worth = math.inf
        for tier in (SCALAR, MOMENTS):
            boost = 1.0 + hysteresis if held >= tier else 1.0
            # No promotion may come before the one it stands on, so none counts more than that one.
            worth = min(worth, boost * _worth(candidate, tier))
            promotions.append((-worth, candidate.size, candidate.name, tier, candidate))
    tiers = {candidate.name: SIGN for candidate in candidates}
    for _, _, name, tier, candidate in sorted(promotions, key=lambda entry: entry[:4]):
        price = candidate.bytes[tier] - candidate.bytes[tier - 1]
        if tiers[name] == tier - 1 and used + price <= budget:
            tiers[name] = tier
            used += price
    return tiers


def check_plan(
    candidates: Sequence[Candidate], tiers: Mapping[str, int], budget: int, *, fixed: int
) -> dict[str, int]:
    """A plan that somebody else made, in the order of `candidates`.

    Raises:
        ValueError: where it is not a tier for each of them and nothing else, or does not fit.
    """
    names = {candidate.name for candidate in candidates}
    strangers = sorted(names.symmetric_difference(tiers))
    if strangers:
        raise ValueError(
            f"tiers must have the path of every tensor and no other, got {len(strangers)} that "
            f"differ, such as {strangers[0]!r}; leave tiers out for a plan of its own."
        )
    plan = {candidate.name: tiers[candidate.name] for candidate in candidates}
    for name, tier in plan.items():
        if tier not in TIERS:
            raise ValueError(f"tiers must be 0, 1 or 2, got {tier!r} for {name}; give one of them.")
    plan = {name: int(tier) for name, tier in plan.items()}
    needed = state_bytes(candidates, plan, fixed=fixed)
    if needed > budget:
        raise ValueError(
            f"tiers must fit state_budget, got a plan of {needed:,} bytes for {budget:,}; give a "
            "larger budget or leave tiers out."
        )
    return plan


def smallest_budget(candidates: Sequence[Candidate], *, fixed: int) -> int:
    """The bytes of the plan in which every tensor is at tier 0."""
    return fixed + sum(candidate.bytes[SIGN] for candidate in candidates)


def state_bytes(candidates: Sequence[Candidate], tiers: Mapping[str, int], *, fixed: int) -> int:
    """The bytes of a plan."""
    return fixed + sum(candidate.bytes[tiers[candidate.name]] for candidate in candidates)


def _worth(candidate: Candidate, tier: int) -> float:
    """Benefit per byte of the step up to `tier`; infinite where it is free."""
    share = SCALAR_SHARE if tier == SCALAR else 1.0 - SCALAR_SHARE
    price = candidate.bytes[tier] - candidate.bytes[tier - 1]
    rms = candidate.rms if math.isfinite(candidate.rms) else 0.0
    return share * candidate.size * rms / price if price > 0 else math.inf


def report(
    candidates: Sequence[Candidate],
    before: Mapping[str, int],
    after: Mapping[str, int],
    gates: Mapping[str, float],
    *,
    step: int,
    budget: int,
    fixed: int,
) -> dict[str, Any]:
    """What one re-tiering did, as a dictionary that `json.dumps` takes.

    Returns:
        `step`, `budget`, `bytes` (of state after it), `tensors` (how many at each tier),
        `transitions` (a list of `name`, `from`, `to`, `rms`, `bytes`, in the order of the tensors)
        and `gates` (those below 1, by name).
    """
    return {
        "step": step,
        "budget": budget,
        "bytes": state_bytes(candidates, after, fixed=fixed),
        "tensors": [sum(after[c.name] == tier for c in candidates) for tier in TIERS],
        "transitions": [
            {
                "name": c.name,
                "from": before[c.name],
                "to": after[c.name],
                "rms": c.rms if math.isfinite(c.rms) else None,
                "bytes": c.bytes[after[c.name]],
            }
            for c in candidates
            if before[c.name] != after[c.name]
        ],
        "gates": {name: gate for name, gate in gates.items() if gate < 1.0},
    }


def observe(averages: filters.Windows, rms: Any, *, xp: Any) -> filters.Windows:
    """The fast and slow average of every tensor's gradient size after one more step.

    Args:
        averages: of the last step; `value` float32 of shape `(tensors,)`, `weight` float32 `()`.
        rms: root mean square of each tensor's gradient; float32, `(tensors,)`.
        xp: the array namespace.

    Returns:
        Bias-corrected averages with decay 0.9 and 0.999 (WP 2, 3), which see at most ten times the
        slow one.
    """
    return filters.windows(
        averages,
        rms,
        fast_decay=FAST_DECAY,
        slow_decay=SLOW_DECAY,
        debias=True,
        outlier_cap=10.0,
        xp=xp,
    )


def averaged_square(second_moment: Any, weight: Any, square: Any) -> Any:
    """The one scalar of a tensor at tier 1 after one more step.

    Args:
        second_moment: `v`, the averaged mean square of its gradient; float32 `()`. Of a tensor that
            comes to this tier later it starts as the square of its slow average.
        weight: that of the slow averages before this step, which every tensor shares.
        square: the mean square of this step's gradient.
    """
    return filters.ema(filters.Ema(second_moment, weight), square, SLOW_DECAY, debias=True).value


def noise_gate(averages: filters.Windows, *, xp: Any) -> Any:
    """Factor on each tensor's step: below 1 while its gradient is larger than it used to be.

    `clip(slow / fast, 0.1, 1)`. A sign or a normalised step does not shrink by itself when a
    tensor's gradient becomes noise; this does it, one-sidedly: a gradient that falls, as it does
    when training converges, gates nothing and raises nothing.

    Returns:
        float32, `(tensors,)`, in `[0.1, 1]`; 1 at the first step and on a steady gradient.
    """
    fast, slow = averages.fast.value, averages.slow.value
    eps = filters.EPS * filters.EPS  # gradients of 1e-8 are still gradients
    return xp.clip((slow + eps) / (fast + eps), GATE_FLOOR, 1.0)


def relative_scale(second_moment: Any, group_mean: Any, *, xp: Any) -> Any:
    """Factor on the sign of a tensor at tier 1: smaller where its gradient is larger than others'.

    `clip(sqrt(mean(v) / v), 0.5, 2)`: the denominator of Adam with one number for the tensor,
    relative to its group's.

    Args:
        second_moment: `v`, the tensor's averaged mean square; float32.
        group_mean: the mean of `v` over the tensors of tier 1; float32 `()`.
        xp: the array namespace.
    """
    eps = filters.EPS * filters.EPS
    return xp.clip(xp.sqrt((group_mean + eps) / (second_moment + eps)), *SCALE_BOUNDS)
