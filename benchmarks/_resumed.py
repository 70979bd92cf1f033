"""What a stopped and resumed run leaves behind, compared bit by bit with one never stopped."""

from collections.abc import Mapping
from typing import Any, NamedTuple

Bits = tuple[str, tuple[int, ...], bytes]
"""Of an array: its dtype, shape and bytes."""


class Resumed(NamedTuple):
    """The outcome.

    Attributes:
        bytes_on_disk: of the checkpoint, parameters included.
        first_difference: as `first_difference` gives it.
    """

    bytes_on_disk: int
    first_difference: str | None


def first_difference(whole: Mapping[str, Any], resumed: Mapping[str, Any]) -> str | None:
    """The first leaf that differs; `None` where all are the same.

    Args:
        whole: leaves by path, `Bits` where they are arrays, of the run that never stopped.
        resumed: those of the run that was stopped.

    Examples:
        >>> first_difference({"a": 1, "b": 2}, {"a": 1, "b": 3})
        'b'
    """
    missing = object()
    for path in {**whole, **resumed}:
        if whole.get(path, missing) != resumed.get(path, missing):
            return path
    return None
