"""What a model takes in memory before it is loaded, and which way to train it fits: bytes alone."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cruxy_control.checks import check_range

GB = 1e9
"""Bytes of a gigabyte, as devices are sold."""

HEADROOM = 1.2
"""What a way to train must leave for activations and the allocator: it fits where this many times
its bytes do."""

_NF4_BLOCK = 64
_NF4_TABLE = 64


class Model(NamedTuple):
    """The sizes of a model's parameters, as far as loading it in few bits is concerned.

    Attributes:
        count: elements of all parameters.
        linear: rows and columns of each matrix that is kept in few bits: those of linear layers,
            output layers excepted. Embeddings, norms, biases and output layers stay in 16 bits.
        buffers: bytes of what is no parameter, such as running means.
    """

    count: int
    linear: tuple[tuple[int, int], ...]
    buffers: int = 0


def loaded_bytes(model: Model, bits: int) -> int:
    """Bytes of a model whose linear layers are loaded in so many bits, and the rest in 16.

    In 8 bits a row has a scale in float32 and a zero in int8 (torchao's weight-only int8), in 4
    bits 64 elements share a scale in float32 and a matrix has a table of 16 values (nf4 of
    bitsandbytes).

    Args:
        model: its sizes.
        bits: 16, 8 or 4.

    Raises:
        ValueError: where `bits` is another number.

    Examples:
        >>> loaded_bytes(Model(count=1000 * 1000 + 10, linear=((1000, 1000),)), bits=8)
        1005020
    """
    if bits not in (16, 8, 4):
        raise ValueError(f"bits must be 16, 8 or 4, got {bits!r}; 16 is bfloat16.")
    if bits == 16:
        return 2 * model.count + model.buffers
    rest = model.count - sum(rows * columns for rows, columns in model.linear)
    coded = (_int8(*shape) if bits == 8 else _nf4(*shape) for shape in model.linear)
    return 2 * rest + sum(coded) + model.buffers


def _int8(rows: int, columns: int) -> int:
    return rows * columns + 5 * rows


def _nf4(rows: int, columns: int) -> int:
    count = rows * columns
    return -(-count // 2) + 4 * -(-count // _NF4_BLOCK) + _NF4_TABLE


def adapter_count(model: Model, rank: int) -> int:
    """Parameters of low-rank adapters (LoRA) beside every linear layer."""
    return sum(rank * (rows + columns) for rows, columns in model.linear)


class Sizes:
    """What an estimate says by name, as `info["int8_gb"]`: for both frameworks' `MemoryEstimate`.

    A subclass has a `Model` as `model`, `device_bytes`, and a mapping of bytes by way as `ways`.
    """

    model: Any
    device_bytes: int | None
    ways: Any

    @property
    def fp16_gb(self) -> float:
        """Gigabytes of the weights in 16 bits: what `load_model(bits=16)` holds."""
        return loaded_bytes(self.model, 16) / GB

    @property
    def int8_gb(self) -> float:
        """Gigabytes of the weights with linear layers in 8 bits: `load_model(bits=8)`."""
        return loaded_bytes(self.model, 8) / GB

    @property
    def int4_gb(self) -> float:
        """Gigabytes of the weights with linear layers in 4 bits: `load_model(bits=4)`."""
        return loaded_bytes(self.model, 4) / GB

    @property
    def recommendation(self) -> str:
        """The first of `ways` that fits the device, in a sentence with its bytes."""
        return recommend(self.ways, self.device_bytes)


NAMES = ("fp16_gb", "int8_gb", "int4_gb", "recommendation")
"""What `keys` of an estimate lists before its own fields."""


def read(sizes: Any, names: Sequence[str], name: str) -> Any:
    """What an estimate says under a name.

    Raises:
        KeyError: where it has no such name.
    """
    if name not in names:
        raise KeyError(f"the names of an estimate are {', '.join(names)}, got {name!r}")
    return getattr(sizes, name)


def recommend(ways: Mapping[str, int], device_bytes: int | None) -> str:
    """Says which way to train fits a device.

    Args:
        ways: bytes of each way, weights, gradients and optimizer state together, in the order in
            which they are to be preferred.
        device_bytes: of the device; `None` where there is none.

    Returns:
        The first whose bytes, `HEADROOM` times, fit; where none does, what to do instead; without
        a device, all of them.

    Raises:
        ValueError: where `device_bytes` is not above 0.

    Examples:
        >>> ways = {"AdamW": 16_000_000_000, "AXIOM with released gradients": 2_100_000_000}
        >>> recommend(ways, 8_000_000_000)
        'AXIOM with released gradients: 2.1 GB of 8.0 GB, which leaves 5.9 GB for activations'
        >>> recommend(ways, 2_000_000_000)
        'does not fit 2.0 GB in any of these ways; the smallest is AXIOM with released gradients \
at 2.1 GB: shard it over 2 devices or take a smaller model'
        >>> recommend(ways, None)
        'no device to compare with; AdamW: 16.0 GB; AXIOM with released gradients: 2.1 GB'
    """
    if device_bytes is None:
        listed = "; ".join(f"{name}: {_gb(size)}" for name, size in ways.items())
        return f"no device to compare with; {listed}"
    check_range("device_bytes", device_bytes, 0.0, lower_open=True, remedy="leave it out")
    for name, size in ways.items():
        if HEADROOM * size <= device_bytes:
            left = _gb(device_bytes - size)
            return (
                f"{name}: {_gb(size)} of {_gb(device_bytes)}, which leaves {left} for activations"
            )
    name = min(ways, key=lambda name: ways[name])
    devices = -(-int(HEADROOM * ways[name]) // int(device_bytes))
    return (
        f"does not fit {_gb(device_bytes)} in any of these ways; the smallest is {name} at "
        f"{_gb(ways[name])}: shard it over {devices} devices or take a smaller model"
    )


def _gb(size: float) -> str:
    return f"{size / GB:,.1f} GB" if size >= 0.1 * GB else f"{size / 1e6:,.1f} MB"
