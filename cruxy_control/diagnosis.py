"""What was measured of tensors, summed up by role and printed, and what is not finite by name.

A framework measures; this adds up, on the host, and writes the table that both of them print.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

MEASURED = ("parameter", "gradient", "update")
"""What is measured of a tensor in every framework; what an optimizer keeps comes after it."""


class Stats(NamedTuple):
    """The numbers of one tensor, or of several together.

    Attributes:
        elements: how many there are.
        rms: the root mean square of those that are finite; 0 of none.
        nonfinite: how many are NaN or infinite.
    """

    elements: int
    rms: float
    nonfinite: int


def pooled(parts: Iterable[Stats]) -> Stats:
    """The numbers of several tensors as those of one."""
    elements, nonfinite, rooms = 0, 0, []
    for part in parts:
        elements, nonfinite = elements + part.elements, nonfinite + part.nonfinite
        rooms.append((part.elements - part.nonfinite, part.rms))
    # Scaled by the largest: the square of what is close to overflowing would do so.
    largest = max((rms for count, rms in rooms if count), default=0.0)
    if not 0.0 < largest < math.inf:
        return Stats(elements, largest, nonfinite)
    total = math.fsum(count * (rms / largest) ** 2 for count, rms in rooms)
    return Stats(elements, largest * math.sqrt(total / (elements - nonfinite)), nonfinite)


class TensorCheck(NamedTuple):
    """What was measured of one tensor.

    Attributes:
        name: of the tensor.
        role: what it is, or the group that it is in.
        values: by name: `parameter`, `gradient` and `update` where there is one, and what the
            optimizer keeps of it.
        rate: the learning rate that it moves by; NaN where that is not known.
        limited: whether a relative limit, and not the learning rate, says how far it moves.
    """

    name: str
    role: str
    values: Mapping[str, Stats]
    rate: float = math.nan
    limited: bool = False

    @property
    def ratio(self) -> float:
        """The size of the update over that of the parameter; NaN where one is not known."""
        return _ratio(self.values)


class RoleCheck(NamedTuple):
    """What was measured of all tensors of a role.

    Attributes:
        role: which one.
        tensors: how many.
        values: see `TensorCheck`; of all of them together.
        rates: the lowest and the highest rate; NaN where none is known.
        limited: how many of them a relative limit binds.
    """

    role: str
    tensors: int
    values: Mapping[str, Stats]
    rates: tuple[float, float]
    limited: int

    @property
    def ratio(self) -> float:
        """The size of the update over that of the parameter; NaN where one is not known."""
        return _ratio(self.values)


class NonFinite(NamedTuple):
    """A tensor that holds something that is not finite.

    Attributes:
        name: of the tensor.
        where: in what of it: `parameter`, `gradient`, `update`, or what the optimizer keeps.
        count: how many elements are NaN or infinite.
        elements: of how many.
    """

    name: str
    where: str
    count: int
    elements: int


def by_role(tensors: Iterable[TensorCheck]) -> dict[str, RoleCheck]:
    """The same by role, in the order in which the roles come."""
    roles: dict[str, list[TensorCheck]] = {}
    for tensor in tensors:
        roles.setdefault(tensor.role, []).append(tensor)
    return {role: _role(role, members) for role, members in roles.items()}


def not_finite(tensors: Iterable[TensorCheck]) -> tuple[NonFinite, ...]:
    """Every tensor that holds something that is not finite, and where."""
    return tuple(
        NonFinite(tensor.name, where, stats.nonfinite, stats.elements)
        for tensor in tensors
        for where, stats in tensor.values.items()
        if stats.nonfinite
    )


def report(
    tensors: Sequence[TensorCheck], nonfinite: Sequence[NonFinite], lines: Sequence[str] = ()
) -> str:
    """The table by role, and below it the name of every tensor that is not finite.

    Args:
        tensors: what was measured.
        nonfinite: what is to be named.
        lines: what stands above the table.
    """
    roles = by_role(tensors)
    kept = dict.fromkeys(name for role in roles.values() for name in role.values)
    columns = [*MEASURED, *(name for name in kept if name not in MEASURED)]
    rows = [["role", "tensors", "elements"]]
    rows[0] += [*columns, "rate", "limited", "not finite"]
    rows[0].insert(rows[0].index("update") + 1, "ratio")
    for role in roles.values():
        sizes = [_text(role.values[n].rms if n in role.values else math.nan) for n in columns]
        sizes.insert(columns.index("update") + 1, _text(role.ratio))
        bad = sum(stats.nonfinite for stats in role.values.values())
        first = [role.role, str(role.tensors), f"{role.values['parameter'].elements:,}"]
        limited = f"{role.limited} of {role.tensors}" if role.limited else "-"
        rows.append([*first, *sizes, _between(*role.rates), limited, f"{bad:,}"])
    named = [f"  {n.name}: {n.where} ({n.count:,} of {n.elements:,})" for n in nonfinite]
    below = ["", "not finite:", *named] if named else ["", "everything is finite"]
    return "\n".join([*lines, "root mean squares by role:", *_aligned(rows), *below])


def headline(telemetry: Mapping[str, Any], limited: str = "") -> str:
    """One line of what the last step did: rate, clip and limit.

    Args:
        telemetry: numbers by name, as the telemetry of an optimizer gives them.
        limited: what a relative limit does, where there is one that binds.
    """
    rates = [value for name, value in telemetry.items() if name.startswith("learning_rate")]
    if any(map(math.isnan, rates)):
        return "no step yet"
    last = "" if telemetry["ok"] else ", the last one skipped"
    parts = [f"{int(telemetry['step'])} steps, {int(telemetry['skipped_total'])} skipped{last}"]
    if rates:
        parts.append(f"learning rate {_between(min(rates), max(rates))}")
    if "clip_scale" in telemetry:
        scale = telemetry["clip_scale"]
        parts.append(f"clip binds, gradient x {scale:.3g}" if scale < 1.0 else "no clip binds")
    return "; ".join([*parts, *([limited] if limited else [])])


def _role(role: str, members: Sequence[TensorCheck]) -> RoleCheck:
    names = dict.fromkeys(name for member in members for name in member.values)
    values = {
        name: pooled(member.values[name] for member in members if name in member.values)
        for name in names
    }
    rates = [member.rate for member in members if not math.isnan(member.rate)]
    lowest, highest = (min(rates), max(rates)) if rates else (math.nan, math.nan)
    limited = sum(member.limited for member in members)
    return RoleCheck(role, len(members), values, (lowest, highest), limited)


def _ratio(values: Mapping[str, Stats]) -> float:
    if "update" not in values:
        return math.nan
    parameter, update = values["parameter"].rms, values["update"].rms
    if parameter == 0.0:
        return math.inf if update else math.nan
    return update / parameter


def _text(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2e}"


def _between(lowest: float, highest: float) -> str:
    low, high = _text(lowest), _text(highest)
    return low if low == high else f"{low} to {high}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows with columns of one width, without those in which nothing stands."""
    columns = [c for c in zip(*rows, strict=True) if any(cell != "-" for cell in c[1:])]
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in zip(*columns, strict=True)
    ]
