"""The states of all random generators that a run draws from, as plain values that can be saved."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import torch


def taken(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """The states as they are now.

    Args:
        generators: those of the user's own, beside the global ones of torch, NumPy and Python.
    """
    state: Any = numpy.random.get_state()
    kind, keys, *rest = state
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": [kind, torch.tensor(keys.tolist(), dtype=torch.int64, device="cpu"), *rest],
        "python": random.getstate(),
        "own": [generator.get_state() for generator in generators],
    }


def restore(states: dict[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Sets them back.

    Args:
        states: from `taken`.
        generators: as many as there were.

    Raises:
        ValueError: where there are more or fewer of them.
    """
    if len(states["own"]) != len(generators):
        raise ValueError(
            f"the loader must have as many generators as the one that was saved, got "
            f"{len(generators)} for {len(states['own'])}; build it as it was."
        )
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, *rest = states["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype(numpy.uint32), *rest))
    random.setstate(states["python"])
    for generator, state in zip(generators, states["own"], strict=True):
        generator.set_state(state)


@contextlib.contextmanager
def unmoved(generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Inside the block random numbers are drawn that leave the states outside as they were."""
    states = taken(generators)
    try:
        yield
    finally:
        restore(states, generators)


def generators_of(loader: Any) -> list[torch.Generator]:
    """The generators that a loader and its samplers have of their own, each once."""
    owners = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    owners.append(getattr(owners[-1], "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    own = [one for one in found if isinstance(one, torch.Generator)]
    return list({id(one): one for one in own}.values())
