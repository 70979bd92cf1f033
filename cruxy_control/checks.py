"""Hyperparameter checks shared by the laws and the optimizers.

A check looks at concrete numbers only. Whatever is not one (a traced value inside
`optax.inject_hyperparams`, a schedule, an array on a device) passes: reading it would
synchronise with the device or fail under `jax.jit`.
"""

import math
import numbers
from typing import Any


def check_range(
    name: str,
    value: Any,
    lower: float = -math.inf,
    upper: float = math.inf,
    *,
    lower_open: bool = False,
    upper_open: bool = False,
    remedy: str,
) -> None:
    """Raises `ValueError` unless `value` lies between the bounds. NaN never does.

    Args:
        name: the hyperparameter as the user wrote it.
        value: what the user gave.
        lower: the smallest legal value.
        upper: the largest legal value.
        lower_open: whether `lower` itself is illegal.
        upper_open: whether `upper` itself is illegal.
        remedy: what to do, a sentence without its full stop.

    Raises:
        ValueError: with the rule, the value received and the remedy.
        TypeError: where `value` is a string or a boolean, which no hyperparameter here is.

    Example:
        >>> check_range("b1", 1.5, 0.0, 1.0, upper_open=True, remedy="0.9 is a usual value")
        Traceback (most recent call last):
            ...
        ValueError: b1 must be in [0, 1), got 1.5; 0.9 is a usual value.
    """
    if isinstance(value, str | bool):
        raise TypeError(f"{name} must be a number, got {value!r}; {remedy}.")
    if not isinstance(value, numbers.Real):
        return
    number = float(value)
    above = number > lower if lower_open else number >= lower
    below = number < upper if upper_open else number <= upper
    if not (above and below):
        interval = f"{'(' if lower_open else '['}{_text(lower)}, {_text(upper)}"
        interval += ")" if upper_open else "]"
        raise ValueError(f"{name} must be in {interval}, got {value!r}; {remedy}.")


def _text(bound: float) -> str:
    return {-math.inf: "-infinity", math.inf: "infinity"}.get(bound, f"{bound:g}")


def check_bounds(name: str, bounds: Any, lower: float, upper: float, *, remedy: str) -> None:
    """Raises unless `bounds` is an ordered pair inside `[lower, upper]`.

    Raises:
        ValueError: with the rule, the value received and the remedy.
    """
    if not (isinstance(bounds, tuple) and len(bounds) == 2):
        raise ValueError(f"{name} must be a pair (lower, upper), got {bounds!r}; {remedy}.")
    for side, bound in zip(("lower", "upper"), bounds, strict=True):
        check_range(f"the {side} end of {name}", bound, lower, upper, remedy=remedy)
    if all(isinstance(bound, numbers.Real) for bound in bounds) and bounds[0] > bounds[1]:
        raise ValueError(f"{name} must have lower <= upper, got {bounds!r}; {remedy}.")


def check_count(name: str, value: Any, lower: int, *, remedy: str) -> None:
    """Raises unless `value` is a whole number of at least `lower`.

    Raises:
        ValueError: with the rule, the value received and the remedy.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < lower:
        raise ValueError(f"{name} must be a whole number >= {lower}, got {value!r}; {remedy}.")
