"""Exact and plain steps of the reference GPT in PyTorch."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cruxy_exact.engines import Precision
from cruxy_exact.reference import Reference
from cruxy_torch import exact


def steps(
    size: Mapping[str, Any], engines: Sequence[str], *, cpu_time: bool = False
) -> tuple[dict[str, Callable[[], float]], int]:
    """What is timed, by name, and the number of parameters.

    Args:
        size: fields of `Reference`.
        engines: of the exact products.
        cpu_time: whether one thread works and the processor's time counts, not the clock's.

    Returns:
        Functions that take a step and return its seconds; `"plain"` is one of them.
    """
    clock = time.process_time if cpu_time else time.perf_counter
    if cpu_time:
        torch.set_num_threads(1)
    like = torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
    reference = Reference(**size)
    found = {"plain": _timed(exact.plain_step(reference, like), like, clock)}
    for engine in engines:
        chosen = Reference(**size, precision=Precision(engine=engine))
        found[engine] = _timed(exact.exact_step(chosen, like), like, clock)
    count = sum(p.numel() for p in reference.init(like, xp=torch).values())
    return found, count


def _timed(
    step: Callable[[int], Any], like: torch.Tensor, clock: Callable[[], float]
) -> Callable[[], float]:
    count = 0

    def call() -> float:
        nonlocal count
        begun = clock()
        step(count)
        if like.is_cuda:
            torch.cuda.synchronize()
        count += 1
        return clock() - begun

    return call
