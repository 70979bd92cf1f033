"""Messages between devices, and how long they are on the wire."""

from collections.abc import Iterable
from typing import NamedTuple


class Message(NamedTuple):
    """A message of a step.

    Attributes:
        operation: such as `"all-reduce"`, by XLA's name.
        bytes: of its result on one device.
        axes: of the mesh, along which it goes.
        devices: that take part in it together.
        times: how often a step sends it.
    """

    operation: str
    bytes: int
    axes: tuple[str, ...]
    devices: int
    times: int = 1


def sent_bytes(message: Message) -> float:
    """What one device sends for a message in a ring, as often as it is sent.

    An all-reduce is a reduce-scatter and an all-gather, each of which sends all but one device's
    share of the whole.
    """
    share = (message.devices - 1) / max(1, message.devices)
    factor = {"all-reduce": 2.0 * share, "collective-permute": 1.0}.get(message.operation, share)
    if message.operation == "reduce-scatter":  # whose result is one device's share
        factor = message.devices - 1.0
    return message.bytes * factor * message.times


def total_sent(messages: Iterable[Message]) -> float:
    """What one device sends in a step."""
    return sum(map(sent_bytes, messages))
