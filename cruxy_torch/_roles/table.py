"""`role_table`: which roles a model has, or an optimizer's groups, to be looked at."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from cruxy_control.roles import Label, Parameter, Rule, check_rules, label, own_index
from cruxy_control.slices import Slices
from cruxy_torch._roles.groups import Factors
from cruxy_torch._roles.layouts import is_fused, slices_of
from cruxy_torch._roles.parameters import find


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
class _Entry:
    """One parameter on its way into a row."""

    name: str
    label: Label
    size: int
    rate: float
    decay: float
    tied: tuple[str, ...] = ()
    slices: Slices | None = None


def role_table(
    model_or_optimizer: nn.Module | Optimizer,
    *,
    rates: Mapping[str, float] | None = None,
    decays: Mapping[str, float] | None = None,
    rules: Iterable[Rule] = (),
) -> RoleTable:
    """The roles of a model's parameters with their multiples of rate and decay, or an optimizer's.

    Args:
        model_or_optimizer: of a model all parameters are shown, whether trained or not. Of an
            optimizer, what its groups hold now: the roles that `param_groups` gave them, else by
            the names that came with `model.named_parameters()`, for which torch is 2.6 or newer.
        rates: see `param_groups`; of a model.
        decays: see `param_groups`; of a model.
        rules: see `label_roles`; where roles are not given yet.

    Returns:
        A table with `rows`, to be printed.

    Raises:
        ValueError: where an optimizer's parameters have neither roles nor names, or comes with
            rates or decays; see `param_groups`.
        TypeError: where it is neither model nor optimizer.

    Example:
        >>> import torch
        >>> import cruxy_torch
        >>> layer = torch.nn.TransformerEncoderLayer(512, nhead=8, bias=False)
        >>> table = cruxy_torch.role_table(layer, rates={"norm": 3})
        >>> for row in table.rows:
        ...     print(row.role, row.tensors, row.parameters, row.rate, row.decay, row.decided_by)
        attention.qkv 1 786432 1.0 1.0 context
        attention.out 1 262144 1.0 1.0 context
        mlp.up 1 1048576 1.0 1.0 context
        mlp.down 1 1048576 1.0 1.0 context
        norm 2 1024 3 0.0 class
        >>> print(str(table).splitlines()[1])
        attention.qkv ... self_attn.in_proj_weight  (axis 0: q 512, k 512, v 512)
    """
    if isinstance(model_or_optimizer, nn.Module):
        entries = _of_model(model_or_optimizer, rates, decays, rules)
    elif isinstance(model_or_optimizer, Optimizer):
        if rates or decays:
            raise ValueError(
                "rates and decays must be left out for an optimizer, whose groups have theirs, got "
                f"{rates or decays!r}; give them to param_groups."
            )
        entries = _of_optimizer(model_or_optimizer, rules)
    else:
        raise TypeError(
            "role_table must be given a torch.nn.Module or a torch optimizer, got "
            f"{type(model_or_optimizer).__name__}; wrappers of optimizers hold it as .optimizer."
        )
    rows: dict[tuple[Any, ...], list[_Entry]] = {}
    for entry in entries:
        key = (entry.label.role, entry.label.of, entry.rate, entry.decay)
        rows.setdefault(key, []).append(entry)
    return RoleTable(
        tuple(_row(entries) for entries in rows.values()),
        of_optimizer=isinstance(model_or_optimizer, Optimizer),
    )


def _row(entries: list[_Entry]) -> RoleRow:
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


def _of_model(
    model: nn.Module,
    rates: Mapping[str, float] | None,
    decays: Mapping[str, float] | None,
    rules: Iterable[Rule],
) -> list[_Entry]:
    found = find(model, rules)
    factors = Factors(found, rates, decays)
    modules = dict(model.named_modules(remove_duplicate=False))
    return [
        _Entry(
            one.names[0],
            one.label,
            one.tensor.numel(),
            *factors.of(one),
            tied=one.tied,
            slices=slices_of(one, modules) if is_fused(one) else None,
        )
        for one in found
    ]


def _of_optimizer(optimizer: Optimizer, rules: Iterable[Rule]) -> list[_Entry]:
    rules = check_rules(rules)
    every = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    entries: list[_Entry] = []
    for index, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [
            f"group {index}, parameter {place}" for place in range(len(group["params"]))
        ]
        if "role" not in group and "param_names" not in group:
            raise ValueError(
                f"the groups of an optimizer must have roles or names, got group {index} without; "
                "make them with cruxy_torch.param_groups, or give named parameters."
            )
        rate, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
        for name, tensor in zip(names, group["params"], strict=True):
            if "role" in group:
                told = Label(group["role"], None, "group")
            else:
                told = label(_named(name, tuple(tensor.shape), every), rules)
            entries.append(_Entry(name, told, tensor.numel(), rate, decay))
    return entries


def _named(name: str, shape: tuple[int, ...], every: list[str]) -> Parameter:
    """What a name alone tells, and those of the other parameters."""
    path = tuple(name.split("."))
    above = ".".join(path[: own_index(path)])
    start = f"{above}." if above else ""
    beside = {other[len(start) :].partition(".")[0] for other in every if other.startswith(start)}
    return Parameter(path, shape, siblings=frozenset(beside))
