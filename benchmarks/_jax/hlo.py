"""Reads a compiled step: how often each gradient is read, what is copied, what calls the host."""

import re

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
