"""NumPy as a law sees it on CPU: the same numbers, faster where they are scalars.

A law is a hundred operations on scalars, and what NumPy's general functions spend on finding out
that theirs are would be most of a small model's step. Arrays are handed on to NumPy.
"""

import math
from typing import Any

import numpy
from numpy import arange, exp, float32, int32, ndarray, sqrt, stack, sum, tanh

__all__ = ["arange", "exp", "float32", "int32", "sqrt", "stack", "sum", "tanh"]


def __getattr__(name: str) -> Any:
    return getattr(numpy, name)


def where(condition: Any, x: Any, y: Any) -> Any:
    """`numpy.where`."""
    if isinstance(condition, ndarray) or isinstance(x, ndarray) or isinstance(y, ndarray):
        return numpy.where(condition, x, y)
    return _typed(x, y) if condition else _typed(y, x)


def minimum(x: Any, y: Any) -> Any:
    """`numpy.minimum`, which gives NaN where either is."""
    if isinstance(x, ndarray) or isinstance(y, ndarray):
        return numpy.minimum(x, y)
    return _typed(x, y) if x < y or x != x else _typed(y, x)


def maximum(x: Any, y: Any) -> Any:
    """`numpy.maximum`, which gives NaN where either is."""
    if isinstance(x, ndarray) or isinstance(y, ndarray):
        return numpy.maximum(x, y)
    return _typed(x, y) if x > y or x != x else _typed(y, x)


def clip(x: Any, lower: Any, upper: Any) -> Any:
    """`numpy.clip`."""
    return minimum(maximum(x, lower), upper)


def isfinite(x: Any) -> Any:
    """`numpy.isfinite`."""
    return numpy.isfinite(x) if isinstance(x, ndarray) else math.isfinite(x)


def zeros_like(x: Any, dtype: Any = None) -> Any:
    """`numpy.zeros_like`."""
    return numpy.zeros_like(x, dtype) if isinstance(x, ndarray) else (dtype or type(x))(0)


def ones_like(x: Any, dtype: Any = None) -> Any:
    """`numpy.ones_like`."""
    return numpy.ones_like(x, dtype) if isinstance(x, ndarray) else (dtype or type(x))(1)


def roll(x: Any, shift: int) -> Any:
    """`numpy.roll` of a vector."""
    return numpy.concatenate((x[-shift:], x[:-shift]))


def _typed(picked: Any, other: Any) -> Any:
    """What was picked; a plain number in the type of what it was picked over."""
    return picked if isinstance(picked, numpy.generic) else type(other)(picked)
