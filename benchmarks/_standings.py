"""What a table of optimizers at one rate each has in common: rows, order, cells and plot."""

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


def ranked(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, lowest loss first."""
    return sorted(result["optimizers"].values(), key=lambda row: row["loss"])


def cells(row: dict[str, Any]) -> tuple[str, str]:
    """Loss and difference as text; one seed has no error."""
    return (
        f"{row['loss']:.3f} \u00b1 {row['error'] or 0.0:.3f}",
        f"{row['difference']:+.3f} \u00b1 {row['difference_error'] or 0.0:.3f}",
    )


def draw(result: dict[str, Any], how: str) -> Figure:
    """A dot a row; `how` ends the title."""
    work = result["workload"]
    figure, axes = one_panel(f"{work['name']}, {work['steps']:,} steps, {how}")
    dots(axes, [(row["label"], row["loss"], row["error"]) for row in ranked(result)], work["unit"])
    return figure
