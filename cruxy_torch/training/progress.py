"""A progress bar where tqdm is installed."""

import contextlib
from typing import Any


def bar_of(steps: int, taken: int, *, shown: bool) -> Any:
    """A bar of so many steps, of which some are taken; one that shows nothing if it is not to."""
    if shown:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return NoBar()
        return tqdm(total=steps, initial=taken, desc="training")
    return NoBar()


class NoBar(contextlib.nullcontext[Any]):
    """A progress bar that shows nothing."""

    def __enter__(self) -> "NoBar":
        return self

    def update(self, count: int) -> None:
        """Counts nothing."""

    def set_postfix(self, **values: str) -> None:
        """Shows nothing."""
