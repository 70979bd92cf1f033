"""Where many tensors lie, as one launch reads it: a table on their device, built once and reused.

What a table holds follows from addresses, lengths and numbers alone, so one that was built for the
same addresses is right whatever has become of the tensors, and a table is never out of date.
"""

import array
import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cruxy_torch._native.triton_kernels import TILE

ROWS = (
    "param", "grad", "first", "first_scales", "second", "second_scales", "average",
    "product1", "product2", "numel", "first_number", "number", "sign", "limit", "count",
)  # fmt: skip
"""The rows of a table, as the kernels count them."""

CHUNKS, MOST = 4096, 64
"""Chunks grow with the model, so that there are about so many, up to so many tiles each."""

_KEPT = 64


class Table(NamedTuple):
    """What a launch is given.

    Attributes:
        values: int64, `(15, tensors)`.
        tensors: how many there are.
        chunks: int32, `(count, 2)`: the tensor of each chunk and its number in it. A tensor without
            elements has a chunk too.
        tiles: in a chunk.
        starts: int32, `(tensors + 1,)`: the number of each tensor's first chunk, and of all.
        counters: int32 zeros, one for each tensor.
        aligned: whether every tensor begins at a multiple of 16 bytes.
        begins: `starts` on the host.
    """

    values: Tensor
    tensors: int
    chunks: Tensor
    tiles: int
    starts: Tensor
    counters: Tensor
    aligned: bool
    begins: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many chunks there are."""
        return self.chunks.shape[0]


_tables: collections.OrderedDict[tuple, Table] = collections.OrderedDict()
_cuts: collections.OrderedDict[tuple, tuple[Tensor, Tensor, int, tuple[int, ...]]] = (
    collections.OrderedDict()
)
_of_graphs: list[object] = []
"""What a CUDA graph reads when it is replayed, at any time until the process ends."""


def table(columns: dict[str, Sequence[int]], device: torch.device) -> Table:
    """The table of these columns.

    Args:
        columns: of `ROWS`, all equally long, with `numel` among them; rows that are left out are 0.
        device: of the tensors.
    """
    count = len(columns["numel"])
    flat = array.array("q")
    for name in ROWS:
        flat.extend(columns.get(name) or [0] * count)
    return _found_or_made(_tables, device, flat.tobytes(), lambda: _table(columns, flat, device))


def _table(columns: dict[str, Sequence[int]], flat: array.array, device: torch.device) -> Table:
    count = len(columns["numel"])
    chunks, starts, tiles, begins = _cut(tuple(columns["numel"]), device)
    lengths = columns["numel"]
    aligned = all(
        address % 16 == 0
        for name in ("param", "grad", "first", "second", "average")
        for address, length in zip(columns.get(name, ()), lengths, strict=False)
        if length
    )
    values = torch.frombuffer(flat, dtype=torch.int64).clone().view(len(ROWS), count)
    counters = torch.zeros(count, dtype=torch.int32, device=device)
    return Table(_there(values, device), count, chunks, tiles, starts, counters, aligned, begins)


_constants: collections.OrderedDict[tuple, Tensor] = collections.OrderedDict()


def constant(value: float, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A number on a device; 0-d, not to be written to."""
    return _found_or_made(
        _constants, device, (value, dtype),
        lambda: torch.full((), value, dtype=dtype, device=device),
    )  # fmt: skip


_vectors: collections.OrderedDict[tuple, Tensor] = collections.OrderedDict()


def vector(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Numbers on a device, float32; not to be written to."""
    flat = array.array("f", numbers)
    return _found_or_made(
        _vectors, device, flat.tobytes(),
        lambda: _there(torch.frombuffer(flat, dtype=torch.float32).clone(), device),
    )  # fmt: skip


def _cut(
    lengths: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, int, tuple[int, ...]]:
    """How tensors are cut into chunks: chunks, starts, tiles and begins of a `Table`."""
    return _found_or_made(_cuts, device, lengths, lambda: _cut_anew(lengths, device))


def _cut_anew(
    lengths: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, int, tuple[int, ...]]:
    tiles = 1
    while tiles < MOST and sum(lengths) > CHUNKS * TILE * tiles:
        tiles *= 2
    each = [max(1, -(-length // (TILE * tiles))) for length in lengths]
    counts = torch.tensor(each, dtype=torch.int64, device="cpu")
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int64, device="cpu")
    starts[1:] = counts.cumsum(0)
    index = torch.repeat_interleave(counts)
    number = torch.arange(len(index), dtype=torch.int64, device="cpu") - starts[index]
    chunks = torch.stack((index, number), dim=1).to(torch.int32)
    there = _there(chunks, device), _there(starts.to(torch.int32), device)
    return *there, tiles, tuple(starts.tolist())


def _found_or_made(
    known: collections.OrderedDict[tuple, Any],
    device: torch.device,
    of: Any,
    make: Callable[[], Any],
) -> Any:
    """What was made of the same before on this device, or what is made now and kept."""
    capturing, stream = _stream(device)
    key = (device, stream, of)
    found = _find(known, key, capturing)
    if found is None:
        found = make()
        if not capturing:  # what is copied in a graph is there only when that is replayed
            known[key] = found
            if len(known) > _KEPT:
                known.popitem(last=False)
    return found


def _find(known: collections.OrderedDict[tuple, Any], key: tuple, capturing: bool) -> Any:
    """What was built before on the same stream, and for a graph on any; `None` for nothing.

    Steps on another stream that a graph goes on from come before its replay, or it would read
    their state too early; so does what they have built. A graph that built it anew would copy it
    from the host again in every replay.
    """
    if capturing and key not in known:
        device, _, of = key
        key = next((k for k in reversed(known) if (k[0], k[2]) == (device, of)), key)
    if key not in known:
        return None
    known.move_to_end(key)
    if capturing:
        _of_graphs.append(known[key])
    return known[key]


def _stream(device: torch.device) -> tuple[bool, int]:
    """Whether a CUDA graph is being captured, and the stream that work is put on."""
    if device.type != "cuda":
        return False, 0
    stream = torch.cuda.current_stream(device).cuda_stream
    return torch.cuda.is_current_stream_capturing(), stream


def _there(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; not waited for."""
    if device.type == "cpu":
        return values
    pinned = values.pin_memory()
    there = pinned.to(device, non_blocking=True)
    if torch.cuda.is_current_stream_capturing():
        _of_graphs.append((pinned, there))  # a replay copies it again
    return there
