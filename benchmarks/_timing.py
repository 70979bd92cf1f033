"""Interleaved timings: every candidate once a round, ratios taken within the round."""

import random
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import track

WARM_UP = 3
"""Rounds that are run first and not counted."""


def interleave(
    candidates: Mapping[str, Callable[[], float]], repeats: int, console: Console | None = None
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round that counts, in a new order each round.

    Args:
        candidates: by name, what runs once and returns its seconds.
        repeats: rounds that count.
        console: where progress is shown; `None` for the standard output.
    """
    order, shuffle = list(candidates), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in track(range(repeats + WARM_UP), "timing", console=console):
        shuffle.shuffle(order)
        for name in order:
            seconds[name].append(candidates[name]())
    return {name: times[WARM_UP:] for name, times in seconds.items()}


def summary(seconds: Mapping[str, list[float]], reference: str) -> dict[str, dict[str, Any]]:
    """Median milliseconds, and median and quartiles of the ratio to the reference, by name.

    The ratio is taken round by round, so that a machine whose speed drifts still gives it right.
    """
    rows = {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[reference], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "milliseconds": 1e3 * statistics.median(times),
            "ratio": middle,
            "ratio_quartiles": [low, high],
        }
    return rows


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row's figures as text: milliseconds, ratio, quartiles."""
    low, high = row["ratio_quartiles"]
    return [f"{row['milliseconds']:.2f}", f"{row['ratio']:.2f}", f"{low:.2f}-{high:.2f}"]
