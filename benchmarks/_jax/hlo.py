"""Reads a compiled step: how often each gradient is read, what is copied, sent, calls the host."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*? ([\w-]+)\((.*)$")
_PASSES_THROUGH = ("bitcast", "reshape", "tuple", "get-tuple-element")


def entry_computation(text: str) -> list[tuple[str, str, list[str], str]]:
    """The entry's instructions as `(name, operation, operands, line)`."""
    inside, found = False, []
    for line in text.splitlines():
        if line.startswith("ENTRY "):
            inside = True
        elif inside and line.startswith("}"):
            break
        elif inside and (match := _INSTRUCTION.match(line)):
            name, operation, rest = match.groups()
            operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
            found.append((name, operation, operands, line))
    return found


def reads_of_parameters(text: str, numbers: set[int]) -> list[int]:
    """How many instructions read each of the entry's parameters with these numbers.

    A fusion counts once however often its body uses the parameter: it is one pass over the memory.
    Bitcasts are looked through.
    """
    instructions = entry_computation(text)
    names = {}
    for name, operation, _, line in instructions:
        if operation == "parameter":
            match = re.search(r"parameter\((\d+)\)", line)
            if match and int(match.group(1)) in numbers:
                names[name] = {name}
    for name, operation, operands, _ in instructions:
        if operation in _PASSES_THROUGH:
            for aliases in names.values():
                if aliases & set(operands):
                    aliases.add(name)
    return [
        sum(
            bool(aliases & set(operands))
            for _, operation, operands, _ in instructions
            if operation not in (*_PASSES_THROUGH, "parameter")
        )
        for aliases in names.values()
    ]


def launched(text: str) -> int:
    """Instructions of the entry that compute: on a GPU about as many kernels and copies."""
    idle = (*_PASSES_THROUGH, "parameter", "constant")
    return sum(operation not in idle for _, operation, _, _ in entry_computation(text))


def host_calls(text: str) -> int:
    """Instructions that leave the device: callbacks, infeed, outfeed, send and receive."""
    pattern = r'custom_call_target="[^"]*callback|= \S+ (infeed|outfeed|send|recv)\('
    return sum(bool(re.search(pattern, line)) for line in text.splitlines())


def copied_bytes(text: str, smallest: int = 1024) -> int:
    """Bytes of float32 arrays that the entry copies, leaving out those below `smallest`."""
    total = 0
    for _, operation, _, line in entry_computation(text):
        match = re.search(r"= f32\[([\d,]*)\]", line)
        if operation == "copy" and match:
            size = 4
            for extent in filter(None, match.group(1).split(",")):
                size *= int(extent)
            total += size if size >= smallest else 0
    return total


class Collective(NamedTuple):
    """A message between devices, as often as the step sends it.

    Attributes:
        operation: `"all-reduce"`, `"all-gather"`, `"all-to-all"`, `"reduce-scatter"`,
            `"collective-permute"` or `"collective-broadcast"`.
        bytes: of its result on one device.
        devices: numbers of the devices of one group.
        times: how often it is sent.
    """

    operation: str
    bytes: int
    devices: tuple[int, ...]
    times: int = 1


_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    r"|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)
_WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}


def collectives(text: str) -> list[Collective]:
    """What a compiled step sends; what stands in a loop of known length counts as often."""
    found = []
    times = _times(text)
    computation = ""
    for line in text.splitlines():
        if line and not line[0].isspace() and (match := re.match(r"(?:ENTRY )?%?([\w.-]+)", line)):
            computation = match.group(1)
        elif match := _COLLECTIVE.search(line):
            shapes, operation = match.groups()
            size = sum(map(_bytes, re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shapes)))
            found.append(Collective(operation, size, _group(line), times.get(computation, 1)))
    return found


def _bytes(shape: tuple[str, str]) -> int:
    kind, extents = shape
    bits = re.search(r"\d+", kind)
    width = _WIDTHS.get(kind) or (int(bits.group()) / 8 if bits else 4)
    return int(width * math.prod(int(extent) for extent in extents.split(",") if extent))


def _times(text: str) -> dict[str, int]:
    """How often the bodies of loops run whose length XLA knows, by name."""
    found = {}
    for line in text.splitlines():
        body = re.search(r"\bwhile\(.*body=%?([\w.-]+)", line)
        length = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
        if body and length:
            found[body.group(1)] = int(length.group(1))
    return found


def _group(line: str) -> tuple[int, ...]:
    """The devices of the first group of a collective."""
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        return tuple(map(int, match.groups()))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return tuple(map(int, match.group(1).split(",")))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\](<=\S+)", line):
        groups, size, rest = match.groups()
        return tuple(_order(rest.removeprefix("<="))[: int(size)]) if groups else ()
    if match := re.search(r"replica_groups=mesh\[(.*?)\](.*?)\{(.*?)\}", line):
        axes, order, chosen = match.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
        ids = np.arange(math.prod(sizes.values()))
        if given := re.search(r"device_ids=\((.*)\)", order):
            ids = np.array(_order(given.group(1)))
        ids = ids.reshape(tuple(sizes.values()))
        names = re.findall(r"'(\w+)'", chosen)
        place = tuple(slice(None) if name in names else 0 for name in sizes)
        return tuple(int(device) for device in ids[place].ravel())
    return ()


def _order(text: str) -> list[int]:
    """The devices in the order of `[8]` or `[4,2]T(1,0)`."""
    shape, _, axes = text.partition("T")
    sizes = [int(size) for size in re.findall(r"\d+", shape)]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    if axes:
        ids = ids.transpose([int(axis) for axis in re.findall(r"\d+", axes.split(")")[0])])
    return [int(device) for device in ids.ravel()]


def axes_of(devices: tuple[int, ...], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh, its devices counted in order, along which a group of devices lies."""
    places = np.unravel_index(np.array(devices, int), tuple(mesh.values()))
    return tuple(
        name for name, along in zip(mesh, places, strict=True) if len(set(along.tolist())) > 1
    )


def kernels(text: str) -> set[str]:
    """What each fusion of a compiled step computes, names left out: what is alike stands once.

    XLA compiles those that are alike once, however many tensors there are.
    """
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if line and not line[0].isspace() and (match := re.match(r"(?:ENTRY )?%?([\w.-]+) ", line)):
            name = match.group(1)
            bodies[name] = []
        elif name and line.startswith("  "):
            bodies[name].append(re.sub(r", metadata=\{.*|, backend_config=.*", "", line.strip()))
    found = set()
    for called in set(re.findall(r" fusion\(.*calls=%?([\w.-]+)", text)):
        known: dict[str, str] = {}

        def number(match: re.Match[str], known: dict[str, str] = known) -> str:
            return known.setdefault(match.group(), f"%{len(known)}")

        body = (re.sub(r"to_apply=%[\w.-]+", "", line) for line in bodies[called])
        found.add("\n".join(re.sub(r"%[\w.-]+", number, line) for line in body))
    return found
