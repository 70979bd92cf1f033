"""`role_table`: which roles a model has, or an optimizer's groups, to be looked at."""

from collections.abc import Iterable, Mapping

from torch import nn
from torch.optim.optimizer import Optimizer

from cruxy_control.role_table import Entry, RoleTable, table_of
from cruxy_control.roles import Label, Parameter, Rule, check_rules, label, own_index
from cruxy_torch._roles.groups import Factors
from cruxy_torch._roles.layouts import is_fused, slices_of
from cruxy_torch._roles.parameters import find, modules_of


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
        ValueError: where an optimizer's parameters have neither roles nor names, or not as many
            names as there are of them, or it comes with rates or decays; see `param_groups`.
        TypeError: where it is neither model nor optimizer.

    Examples:
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
    return table_of(entries, of_optimizer=isinstance(model_or_optimizer, Optimizer))


def _of_model(
    model: nn.Module,
    rates: Mapping[str, float] | None,
    decays: Mapping[str, float] | None,
    rules: Iterable[Rule],
) -> list[Entry]:
    found = find(model, rules)
    factors = Factors(found, rates, decays)
    modules = modules_of(model)
    return [
        Entry(
            one.names[0],
            one.label,
            one.tensor.numel(),
            *factors.of(one),
            tied=one.tied,
            slices=slices_of(one, modules) if is_fused(one) else None,
        )
        for one in found
    ]


def _of_optimizer(optimizer: Optimizer, rules: Iterable[Rule]) -> list[Entry]:
    rules = check_rules(rules)
    every = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    entries: list[Entry] = []
    for index, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [
            f"group {index}, parameter {place}" for place in range(len(group["params"]))
        ]
        if len(names) != len(group["params"]):
            raise ValueError(
                f"a group must have as many param_names as params, got {len(names)} and "
                f"{len(group['params'])} in group {index}; change both where one is changed."
            )
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
            entries.append(Entry(name, told, tensor.numel(), rate, decay))
    return entries


def _named(name: str, shape: tuple[int, ...], every: list[str]) -> Parameter:
    """What a name alone tells, and those of the other parameters."""
    path = tuple(name.split("."))
    above = ".".join(path[: own_index(path)])
    start = f"{above}." if above else ""
    beside = {other[len(start) :].partition(".")[0] for other in every if other.startswith(start)}
    return Parameter(path, shape, siblings=frozenset(beside))
