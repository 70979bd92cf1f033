"""Which cases of a test are fast: the others repeat a near relative, and run in `make test-all`."""

from itertools import cycle, islice, product

import pytest


def _marked(case, fast):
    return pytest.param(*case, marks=[] if fast else [pytest.mark.slow])


def relatives(values, fast):
    """Values for `parametrize`, those that are not in `fast` slow."""
    return [_marked((value,), value in fast) for value in values]


def crossed(*axes, fast=None):
    """All combinations for `parametrize`, those that are not in `fast` slow.

    Without `fast` as few are fast as bring every value of every axis once.
    """
    axes = [list(axis) for axis in axes]
    if fast is None:
        longest = max(map(len, axes))
        fast = list(zip(*(islice(cycle(axis), longest) for axis in axes), strict=True))
    return [_marked(case, case in fast) for case in product(*axes)]
