"""The table of roles that both frameworks print: a row for the parameters of one role."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from cruxy_control.roles import Label
from cruxy_control.slices import Slices


@dataclasses.dataclass(frozen=True)
class RoleRow:
    """Parameters of one role.

    Attributes:
        role: theirs.
        of: what a bias or an adapter belongs to; `None` for others.
        tensors: how many they are.
        parameters: how many elements they have.
        rate: of a model what multiplies the learning rate, of an optimizer the learning rate.
        decay: of a model what multiplies the weight decay, of an optimizer the weight decay.
        decided_by: what told the role; several things by comma.
        example: the name of the first.
        tied: what else the first is used as.
        slices: where q, k and v lie in the first, where it holds all three and that is known.
    """

    role: str
    of: str | None
    tensors: int
    parameters: int
    rate: float
    decay: float
    decided_by: str
    example: str
    tied: tuple[str, ...] = ()
    slices: Slices | None = None

    def _note(self) -> str:
        notes = [f"tied: {', '.join(self.tied)}"] if self.tied else []
        if self.slices:
            sizes = ", ".join(f"{name} {size}" for name, size in self.slices.sizes.items() if size)
            notes.append(f"axis {self.slices.axis}: {sizes}")
        return "".join(f"  ({note})" for note in notes)


@dataclasses.dataclass(frozen=True)
class RoleTable:
    """What the parameters are; printed, a table.

    Attributes:
        rows: a row for each role, and for what it belongs to, in the order of the parameters.
        of_optimizer: whether rates and decays are an optimizer's own, and no multiples.
    """

    rows: tuple[RoleRow, ...]
    of_optimizer: bool = False

    def __str__(self) -> str:
        names = [f"{row.role} ({row.of})" if row.of else row.role for row in self.rows]
        width = max(map(len, ["role", *names]))
        times = "" if self.of_optimizer else "x "
        lines = [
            f"{'role':<{width}}{'tensors':>9}{'parameters':>16}{'rate':>10}{'decay':>9}"
            f"  {'decided by':<12}for example"
        ]
        for name, row in zip(names, self.rows, strict=True):
            rate, decay = f"{times}{row.rate:.3g}", f"{times}{row.decay:.3g}"
            lines.append(
                f"{name:<{width}}{row.tensors:>9,}{row.parameters:>16,}{rate:>10}{decay:>9}"
                f"  {row.decided_by:<12}{row.example}{row._note()}"
            )
        return "\n".join(line.rstrip() for line in lines)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter on its way into a row."""

    name: str
    label: Label
    size: int
    rate: float
    decay: float
    tied: tuple[str, ...] = ()
    slices: Slices | None = None


def table_of(entries: Iterable[Entry], *, of_optimizer: bool = False) -> RoleTable:
    """The table of these parameters."""
    rows: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        key = (entry.label.role, entry.label.of, entry.rate, entry.decay)
        rows.setdefault(key, []).append(entry)
    return RoleTable(tuple(map(_row, rows.values())), of_optimizer)


def _row(entries: list[Entry]) -> RoleRow:
    first = entries[0]
    return RoleRow(
        role=first.label.role,
        of=first.label.of,
        tensors=len(entries),
        parameters=sum(entry.size for entry in entries),
        rate=first.rate,
        decay=first.decay,
        decided_by=", ".join(dict.fromkeys(entry.label.decided_by for entry in entries)),
        example=first.name,
        tied=first.tied,
        slices=first.slices,
    )
