"""What Flax has to know of our classes to write them to bytes and back, told once it is there.

A state is made of NamedTuples and dictionaries, which Flax knows, and of two classes that it does
not. Flax is never imported here: who writes a state with it has done so.
"""

import dataclasses
import sys
from typing import Any

_told: list[type] = []


def tell_flax(kind: type, arrays: tuple[str, ...] = (), structure: tuple[str, ...] = ()) -> None:
    """Has `flax.serialization` write instances of a frozen dataclass; nothing where it is absent.

    Args:
        kind: the class.
        arrays: its fields that are written and read.
        structure: those that are written, and have to be the same where they are read.
    """
    flax: Any = sys.modules.get("flax.serialization")
    if kind in _told or not hasattr(flax, "register_serialization_state"):
        return

    def to_state_dict(node: Any) -> dict[str, Any]:
        parts = {name: flax.to_state_dict(getattr(node, name)) for name in arrays}
        return parts | {name: repr(getattr(node, name)) for name in structure}

    def from_state_dict(node: Any, parts: dict[str, Any]) -> Any:
        for name in structure:
            if parts.get(name) != repr(getattr(node, name)):
                raise ValueError(
                    f"{kind.__name__}.{name} must be that of the state which was written, got "
                    f"{getattr(node, name)!r} for {parts.get(name)}; read it into the state of an "
                    "optimizer with the same arguments (for cosmic, with the same tiers=)."
                )
        return dataclasses.replace(
            node,
            **{name: flax.from_state_dict(getattr(node, name), parts[name]) for name in arrays},
        )

    flax.register_serialization_state(kind, to_state_dict, from_state_dict, override=True)
    _told.append(kind)
