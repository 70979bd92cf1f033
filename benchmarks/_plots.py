"""How the figures are drawn: one look for every benchmark."""

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito (2008), told apart with any colour vision; the marker tells apart what shares one.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))

CROWD = 15
"""Curves that a panel of the usual size has a place for in its legend."""


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker by name, the same for the same order of names."""
    return {
        name: {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": DASHES[i // len(COLORS) % len(DASHES)],
        }
        for i, name in enumerate(names)
    }


def one_panel(title: str, curves: int = 1) -> tuple[Figure, Axes]:
    """A figure with a single panel, larger where its legend has many curves."""
    size = (9, 5.2) if curves <= CROWD else (13, 0.28 * curves + 1.0)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    finish(axes, title)
    return figure, axes


def finish(axes: Axes, title: str) -> None:
    """Heading, light grid, no box."""
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def dots(axes: Axes, rows: Sequence[tuple[str, float | None, float | None]], unit: str) -> None:
    """One dot with its error bar a row, the first row on top.

    Args:
        axes: where to.
        rows: label, mean and standard error each; a mean of `None` leaves the row empty.
        unit: of the mean.
    """
    places = range(len(rows))
    for place, (_, mean, error) in zip(places, rows, strict=True):
        if mean is not None:
            axes.errorbar(mean, place, xerr=error or 0.0, fmt="o", color=COLORS[0], capsize=3)
    axes.set_yticks(list(places), [row[0] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit}; bars: standard error over seeds")


def bars(axes: Axes, rows: Sequence[tuple[str, float, str, str]], unit: str) -> None:
    """One bar a row, the first row on top.

    Args:
        axes: where to.
        rows: label, value, the text at the bar's end and the bar's colour each.
        unit: of the values.
    """
    labels, values, texts, colors = zip(*rows, strict=True)
    drawn = axes.barh(range(len(rows)), values, color=colors)
    axes.bar_label(drawn, [f" {text}" for text in texts])
    axes.set_yticks(range(len(rows)), labels)
    axes.set_axisbelow(True)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xlabel(unit)


def legend(axes: Axes) -> None:
    """A legend beside the panel."""
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=3.5)
