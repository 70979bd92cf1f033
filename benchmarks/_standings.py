"""What a table of optimizers at one rate each has in common: rows, order, cells and plot."""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from benchmarks._comparison import label
from benchmarks._plots import dots, one_panel
from benchmarks._statistics import mean, paired


def standing(
    name: str, rate: float, losses: Mapping[int, float], reference: Mapping[int, float]
) -> dict[str, Any]:
    """The figures of an optimizer: its loss, and the difference to the reference's by seed."""
    at_end, difference = mean([*losses.values()]), paired(losses, reference)
    return {
        "label": label(name),
        "rate": rate,
        "loss": at_end.mean,
        "error": at_end.error,
        "difference": difference.mean,
        "difference_error": difference.error,
    }


def named(result: dict[str, Any], name: str) -> dict[str, Any]:
    """The row of an optimizer, whatever its framework."""
    rows = result["optimizers"]
    return rows[name] if name in rows else rows[f"torch:{name}"]


def ranked(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, lowest loss first."""
    return sorted(result["optimizers"].values(), key=lambda row: row["loss"])


def cells(row: dict[str, Any], reference: dict[str, Any]) -> tuple[str, str]:
    """Loss and difference as text; one seed has no error.

    A row that was kept from earlier figures was paired with the reference of then: its difference
    is that of the means.
    """
    loss, error = row["loss"], row["error"] or 0.0
    difference, its_error, how = row["difference"], row["difference_error"] or 0.0, ""
    if "commit" in row and "commit" not in reference:
        difference = loss - reference["loss"]
        its_error, how = math.hypot(error, reference["error"] or 0.0), ", not paired"
    return f"{loss:.3f} \u00b1 {error:.3f}", f"{difference:+.3f} \u00b1 {its_error:.3f}{how}"


def draw(result: dict[str, Any], how: str) -> Figure:
    """A dot a row; `how` ends the title."""
    work = result["workload"]
    figure, axes = one_panel(f"{work['name']}, {work['steps']:,} steps, {how}")
    dots(axes, [(row["label"], row["loss"], row["error"]) for row in ranked(result)], work["unit"])
    return figure
