"""The end of a run under `SelfDriving`, begun at any step."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cruxy_control.self_driving import SelfDrivingState, begin_cooldown
from cruxy_torch import _law_state


def begin(law_state: dict[str, Tensor], names: Any, steps: int) -> None:
    """Lets the rate of `SelfDriving` fall to 0 over these steps, in place.

    Raises:
        ValueError: where the law is another.
    """
    own = next((node for node in _nodes(names) if isinstance(node, SelfDrivingState)), None)
    if own is None:
        raise ValueError(
            "cooldown() belongs to mode='self_driving', got an optimizer under another law; give a "
            "scheduler of torch.optim in its place."
        )
    state = begin_cooldown(_law_state.restored(own, law_state), steps, xp=torch)
    for name, value in zip(own.cooldown, state.cooldown, strict=True):
        law_state[name].copy_(value)


def _nodes(state: Any) -> Iterator[Any]:
    """A nested NamedTuple and all that are in it."""
    if isinstance(state, tuple):
        yield state
        for value in state:
            yield from _nodes(value)
