"""A loader that is read on and on, epoch after epoch, and again from the middle."""

import warnings
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from cruxy_torch.training import random_states

_PRINTED = 1 << 16


class Batches:
    """The batches of a loader without an end.

    A loader with `state_dict` and `load_state_dict`, such as torchdata's `StatefulDataLoader`, says
    itself where it is. Any other is read anew from the beginning of its epoch, with the random
    states of that moment, past the batches that were taken.

    Args:
        loader: an iterable that can be read more than once.

    Attributes:
        epoch: from 0.
        taken: batches of this epoch so far.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader: Any = loader
        self._generators = random_states.generators_of(loader)
        self._iterator: Iterator[Any] | None = None
        self._start: dict[str, Any] | None = None
        self._last: Any = None
        self.epoch, self.taken = 0, 0

    def take(self) -> Any:
        """The next batch; at the end of the loader the first of a new epoch.

        Raises:
            ValueError: where the loader has none, or none any more.
        """
        if self._iterator is None:
            self._begin()
        batch = self._next()
        if batch is _END:
            if self.taken == 0:
                raise ValueError(
                    "train_loader must have batches, got an empty one; with drop_last=True a data "
                    "set smaller than a batch has none."
                )
            self.epoch, self.taken = self.epoch + 1, 0
            self._begin()
            batch = self._next()
            if batch is _END:
                raise ValueError(
                    "train_loader must begin anew for every epoch, got one that can be read once; "
                    "give a DataLoader in place of a generator."
                )
        self.taken += 1
        self._last = batch
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, as plain values; the random states of now are not in it."""
        state = {
            "epoch": self.epoch,
            "taken": self.taken,
            "start": self._start,
            "print": _print(self._last),
        }
        if _is_stateful(self._loader):
            state["loader"] = self._loader.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where the loader was; the random states are then anywhere.

        Raises:
            ValueError: where the loader has fewer batches than were taken.
        """
        self.epoch, self.taken = state["epoch"], state["taken"]
        self._start, self._iterator = state["start"], None
        if self._start is None:
            return
        if "loader" in state and _is_stateful(self._loader):
            self._loader.load_state_dict(state["loader"])
            self._iterator = iter(self._loader)
            return
        if self.epoch > 0 and _keeps_workers(self._loader):
            iter(self._loader)  # in later epochs a loader that keeps its workers draws no seed
        random_states.restore(self._start, self._generators)
        self._iterator = iter(self._loader)
        for number in range(self.taken):
            self._last = self._next()
            if self._last is _END:
                raise ValueError(
                    f"train_loader must have the {self.taken} batches that were taken, got "
                    f"{number}; give the data and the batch size of the run that was saved."
                )
        if self.taken and _print(self._last) != state["print"]:
            warnings.warn(
                "train_loader gives other batches than in the run that was saved: its data or its "
                "order differ, and the run goes on with what it has. A data set that draws at "
                "random in this process shows this too, and does no harm.",
                stacklevel=2,
            )

    def _begin(self) -> None:
        self._start = random_states.taken(self._generators)
        self._iterator = iter(self._loader)

    def _next(self) -> Any:
        assert self._iterator is not None
        return next(self._iterator, _END)


_END = object()


def _is_stateful(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _keeps_workers(loader: Any) -> bool:
    keeps = getattr(loader, "persistent_workers", False)
    return bool(keeps) and getattr(loader, "_iterator", None) is None


def _print(batch: Any) -> int:
    """A checksum of the beginning of each tensor in a batch."""
    total = 0
    for tensor in tensors(batch):
        flat = tensor.detach().reshape(-1)
        flat = flat[: _PRINTED // max(1, flat.element_size())]
        if flat.dtype is torch.bool or not flat.is_complex():
            flat = flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)
            total = zlib.crc32(flat.cpu().numpy().tobytes(), total)
    return total


def tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and mappings."""
    if isinstance(batch, Tensor):
        yield batch
    elif hasattr(batch, "values"):
        for value in batch.values():
            yield from tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from tensors(value)


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if hasattr(batch, "items"):
        return {name: moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(moved(value, device) for value in batch)
    return batch
