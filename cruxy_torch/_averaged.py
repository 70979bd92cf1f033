"""Averages of parameters in the parameters' place, for as long as a block lasts."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cruxy_torch._blocks import blocks
from cruxy_torch._distributed.shards import drop_gathered, local
from cruxy_torch._memory.state import has_average, kept_average
from cruxy_torch._near import value


@contextlib.contextmanager
def averaged_block(optimizer: Any) -> Iterator[None]:
    """Averages in place of an optimizer's parameters, whose `_averaged` says so meanwhile.

    Args:
        optimizer: with `state` by parameter.

    Raises:
        RuntimeError: where blocks are nested.
    """
    if optimizer._averaged:
        raise RuntimeError("averaged() blocks must not be nested; leave the outer one first.")
    optimizer._averaged = True
    try:
        with averages_in_place(optimizer.state):
            yield
    finally:
        optimizer._averaged = False


@contextlib.contextmanager
def averages_in_place(states: Mapping[Any, Mapping[str, Any]]) -> Iterator[None]:
    """Copies the average of each parameter that has one into it, and the parameters back.

    They are copied back whatever happens in the block. On both ways modules under `fully_shard` let
    go of what they have gathered, so that the next forward pass sees what is there.

    Args:
        states: of an optimizer, by parameter.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    drop_gathered(states)
    try:
        with torch.no_grad():
            for param, state in states.items():
                if has_average(state):
                    kept.append((param, param.detach().clone()))
                    _put_average(param, state)
        yield
    finally:
        with torch.no_grad():
            for param, before in kept:
                param.copy_(before)
        drop_gathered(states)


def _put_average(param: Tensor, state: Mapping[str, Any]) -> None:
    if "average" in state:
        param.copy_(state["average"])
        return
    for p, mean in blocks(local(param), kept_average(param, state, 0)):
        p.copy_(value(p, mean))
