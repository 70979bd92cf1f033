"""Hyperparameter checks shared by the laws and the optimizers.

A check looks at concrete numbers only. Whatever is not one (a traced value inside
`optax.inject_hyperparams`, a schedule, an array on a device) passes: reading it would
synchronise with the device or fail under `jax.jit`.
"""

import dataclasses
import math
import numbers
from typing import Any


def check_range(
    name: str,
    value: Any,
    lower: float | None = None,
    upper: float | None = None,
    *,
    lower_open: bool = False,
    upper_open: bool = False,
    remedy: str,
) -> Any:
    """Raises `ValueError` unless `value` lies between the bounds. NaN never does.

    Args:
        name: the hyperparameter as the user wrote it.
        value: what the user gave.
        lower: the smallest legal value; `None` for any finite one.
        upper: the largest legal value; `None` for any finite one, `math.inf` where infinity says
            something too, such as a threshold that is never reached.
        lower_open: whether `lower` itself is illegal.
        upper_open: whether `upper` itself is illegal.
        remedy: what to do, a sentence without its full stop.

    Returns:
        `value`, as a plain float where it is a concrete number: a NumPy scalar would turn float32
        states into float64 ones.

    Raises:
        ValueError: with the rule, the value received and the remedy.
        TypeError: where `value` can be no number: `None`, a string, a boolean, a sequence.

    Examples:
        >>> check_range("b1", 1.5, 0.0, 1.0, upper_open=True, remedy="0.9 is a usual value")
        Traceback (most recent call last):
            ...
        ValueError: b1 must be in [0, 1), got 1.5; 0.9 is a usual value.
    """
    if value is None or isinstance(value, str | bool | list | tuple | dict):
        raise TypeError(f"{name} must be a number, got {value!r}; {remedy}.")
    if not isinstance(value, numbers.Real):
        return value
    number = float(value)
    if lower is None:
        lower, lower_open = -math.inf, True
    if upper is None:
        upper, upper_open = math.inf, True
    above = number > lower if lower_open else number >= lower
    below = number < upper if upper_open else number <= upper
    if not (above and below):
        interval = f"{'(' if lower_open else '['}{_text(lower)}, {_text(upper)}"
        interval += ")" if upper_open else "]"
        raise ValueError(f"{name} must be in {interval}, got {value!r}; {remedy}.")
    return number


def _text(bound: float) -> str:
    return {-math.inf: "-infinity", math.inf: "infinity"}.get(bound, f"{bound:g}")


def check_bounds(
    name: str,
    bounds: Any,
    lower: float,
    upper: float,
    *,
    around: float | None = None,
    remedy: str,
) -> tuple[Any, Any]:
    """Raises unless `bounds` is an ordered pair inside `[lower, upper]`, with `around` in it.

    Returns:
        The pair, as plain floats where they are concrete numbers.

    Raises:
        ValueError: with the rule, the value received and the remedy.
    """
    if not (isinstance(bounds, tuple) and len(bounds) == 2):
        raise ValueError(f"{name} must be a pair (lower, upper), got {bounds!r}; {remedy}.")
    ends = tuple(
        check_range(f"the {side} end of {name}", bound, lower, upper, remedy=remedy)
        for side, bound in zip(("lower", "upper"), bounds, strict=True)
    )
    if all(isinstance(end, float) for end in ends):
        if ends[0] > ends[1]:
            raise ValueError(f"{name} must have lower <= upper, got {bounds!r}; {remedy}.")
        if around is not None and not ends[0] <= around <= ends[1]:
            raise ValueError(f"{name} must contain {around:g}, got {bounds!r}; {remedy}.")
    return ends


def check_count(name: str, value: Any, lower: int, *, remedy: str) -> int:
    """Raises unless `value` is a whole number of at least `lower`, NumPy's included.

    Returns:
        `value` as a plain int.

    Raises:
        ValueError: with the rule, the value received and the remedy.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < lower:
        # A count shapes the program, and `inject_hyperparams` makes an array of every number.
        if hasattr(value, "aval"):
            remedy = "name it in static_args under optax.inject_hyperparams"
        raise ValueError(f"{name} must be a whole number >= {lower}, got {value!r}; {remedy}.")
    return int(value)


def make_plain(law: Any) -> None:
    """Turns the numbers of a frozen law into plain ones; its switches have to be booleans.

    Raises:
        TypeError: where a field that is a boolean by default is something else.
    """
    for field in dataclasses.fields(law):
        value = getattr(law, field.name)
        if isinstance(field.default, bool) and not isinstance(value, bool):
            raise TypeError(f"{field.name} must be True or False, got {value!r}; give one of them.")
        object.__setattr__(law, field.name, _plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_plain(part) for part in value)
    if isinstance(value, numbers.Integral):
        return value if isinstance(value, bool) else int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return value
