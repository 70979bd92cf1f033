"""Means with their errors, differences paired by seed, and the sensitivity to the learning rate."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Mean(NamedTuple):
    """A mean over seeds and its standard error.

    Attributes:
        mean: over the runs; NaN if one of them is.
        error: standard deviation (with `n - 1`) over the square root of `n`; NaN for one run.
        count: number of runs.
    """

    mean: float
    error: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} \u00b1 {self.error:.3f}"


def mean(values: Sequence[float]) -> Mean:
    """The mean of at least one value and its standard error.

    Examples:
        >>> print(mean([1.0, 2.0, 3.0]))
        2.000 ± 0.577
    """
    array = np.asarray(values, np.float64)
    error = array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return Mean(float(array.mean()), float(error), len(array))


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Mean:
    """The mean difference to a reference, seed by seed.

    What a seed makes easy or hard for both falls out, so the error is smaller than that of the
    difference of two means.

    Examples:
        >>> print(paired({0: 1.5, 1: 2.5}, {0: 1.0, 1: 2.0}))
        0.500 ± 0.000

    Raises:
        ValueError: if the seeds differ.
    """
    if values.keys() != reference.keys():
        raise ValueError(
            f"a paired difference needs the same seeds, got {sorted(values)} and "
            f"{sorted(reference)}; run both with the same ones."
        )
    return mean([values[seed] - reference[seed] for seed in values])


def capped(loss: float, start: float) -> float:
    """The loss, or the one at the start where it is no number or worse than that."""
    return min(loss, start) if math.isfinite(loss) else start


class Sensitivity(NamedTuple):
    """How good an optimizer is at its best rate, and how much that rate matters.

    Attributes:
        best: the lowest loss over the grid, `l*`.
        best_rate: where it is.
        sensitivity: mean over the grid of what the loss lies above `best`.
        at_edge: whether the best rate is an end of a grid of several, so that a better one may lie
            beyond.
    """

    best: float
    best_rate: float
    sensitivity: float
    at_edge: bool


def sensitivity(losses: Mapping[float, float], start: float) -> Sensitivity:
    """Learning-rate sensitivity of Wortsman et al. (2023, arXiv:2309.14322, section 2.2).

    `S = mean over rates of (min(l(rate), l0) - l*)`, with a loss that is no number counted as `l0`.

    Args:
        losses: final loss by rate, at least one.
        start: the loss of the untrained model, `l0`.

    Examples:
        >>> sensitivity({0.01: 2.0, 0.1: 1.0, 1.0: float("nan")}, start=4.0)
        Sensitivity(best=1.0, best_rate=0.1, sensitivity=1.3333333333333333, at_edge=False)
    """
    curve = {rate: capped(loss, start) for rate, loss in losses.items()}
    best_rate = min(curve, key=lambda rate: curve[rate])
    best = curve[best_rate]
    above = sum(loss - best for loss in curve.values()) / len(curve)
    at_edge = len(curve) > 1 and best_rate in (min(curve), max(curve))
    return Sensitivity(best, best_rate, above, at_edge)
