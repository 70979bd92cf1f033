"""What a module tells of its parameters: owners, what stands beside, what makes the output."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from cruxy_control.roles import (
    TRANSPARENT,
    Label,
    Parameter,
    Rule,
    adapter_index,
    check_rules,
    label,
    own_index,
)


class Found(NamedTuple):
    """A parameter of a model, once, whatever its number of names."""

    names: tuple[str, ...]  # the first is that of `named_parameters`
    tensor: Tensor
    parameter: Parameter  # under the name that decided
    label: Label
    tied: tuple[str, ...] = ()  # other roles it has under its other names


def find(model: nn.Module, rules: Iterable[Rule] = ()) -> list[Found]:
    """All parameters of a model with their roles, in its own order.

    Raises:
        TypeError: where it is no model, or a rule is no pair of a pattern or function and a role.
        ValueError: where a rule names no role, or two modules share a parameter in two roles.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; roles need its modules."
        )
    rules = check_rules(rules)
    tree = _Tree(model)
    named: dict[Tensor, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        named.setdefault(tensor, []).append(name)
    found: list[Found] = []
    for tensor, names in named.items():
        told = {}
        for name in names:
            parameter = tree.parameter(name, tensor)
            told[name] = parameter, label(parameter, rules)
        found.append(_merged(tensor, told))
    return found


def _merged(tensor: Tensor, told: dict[str, tuple[Parameter, Label]]) -> Found:
    """One role of what its names told: a rule's, else that which says most."""
    by_rule = {name: at for name, at in told.items() if at[1].decided_by == "rule"}
    known = {name: at for name, at in told.items() if at[1].role not in ("vector", "matrix")}
    weighed = by_rule or known or told
    roles: dict[str, str] = {}
    for name, (_, found) in weighed.items():
        roles.setdefault(found.role, name)
    tied = ()
    if roles.keys() == {"embedding", "head"}:
        tied = ("head",)
    elif len(roles) > 1:
        (one, as_one), (other, as_other) = list(roles.items())[:2]
        raise ValueError(
            f"a parameter must have one role, got {one} as {as_one!r} and {other} as {as_other!r}, "
            f"which are the same; say which by a rule, such as rules=[({as_one!r}, {one!r})]."
        )
    role = "embedding" if tied else next(iter(roles))
    candidates = [at for at in weighed.values() if at[1].role == role]
    parameter, chosen = next((at for at in candidates if at[1].of), candidates[0])
    return Found(tuple(told), tensor, parameter, chosen, tied)


class _Tree:
    """The modules of a model by their paths."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        outputs = {id(module) for module in map(_output, self._modules.values()) if module}
        self._outputs = {name for name, m in self._modules.items() if id(m) in outputs}
        self._last = _last(model)

    def parameter(self, name: str, tensor: Tensor) -> Parameter:
        """What is known of a parameter under one of its names."""
        path = tuple(name.split("."))
        own = own_index(path)
        prefixes = [".".join(path[:i]) for i in range(len(path))]
        adapted = adapter_index(path)
        owner = prefixes[-1 if adapted is None else adapted]
        if "parametrizations" in path:
            owner = prefixes[path.index("parametrizations")]
        module = _unwrapped(self._modules[owner])
        beside = self._modules[prefixes[own].removesuffix(".parametrizations")]
        owned = {*prefixes[own + 1 :], owner}
        return Parameter(
            path=path,
            shape=tuple(tensor.shape),
            owners=tuple(type(self._modules[prefix]).__name__ for prefix in prefixes),
            kind=_kind(module),
            is_output=not owned.isdisjoint(self._outputs),
            is_last=any(self._modules[prefix] is self._last for prefix in owned),
            place=_place(module, [self._modules[prefix] for prefix in prefixes[own + 1 :]]),
            siblings=frozenset([*beside._modules, *beside._parameters]),
        )


def _output(module: nn.Module) -> nn.Module | None:
    """The output embedding that a model names, in the manner of transformers."""
    if not hasattr(type(module), "get_output_embeddings"):
        return None
    try:
        found = module.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    except (AttributeError, NotImplementedError):  # a part without an output
        return None
    return found if isinstance(found, nn.Module) else None


def _last(model: nn.Module) -> nn.Module | None:
    """The linear layer at the end of a model, where it or a chain at its end holds one."""
    module, inside = model, False
    while True:
        if _kind(_unwrapped(module)) == "linear":
            return module
        children = [m for m in module.children() if any(True for _ in m.parameters())]
        own = any(True for _ in module.parameters(recurse=False))
        if not children or own or (inside and not isinstance(module, nn.Sequential)):
            return None
        inside = inside or len(children) > 1  # what holds one part alone is a wrapper
        module = children[-1]


def _place(module: nn.Module, above: list[nn.Module]) -> tuple[int, int]:
    """Which of the linear layers of its chain a module is, and how many there are."""
    chains = [m for m in above if isinstance(m, nn.Sequential)]
    if not chains:
        return 0, 0
    linear = [part for part in map(_unwrapped, chains[-1].children()) if _kind(part) == "linear"]
    return (linear.index(module) + 1, len(linear)) if module in linear else (0, 0)


def _unwrapped(module: nn.Module) -> nn.Module:
    """What a wrapper holds."""
    for name in TRANSPARENT:
        inner = module._modules.get(name)
        if inner is not None:
            return _unwrapped(inner)
    return module


_KINDS: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("attention", (nn.MultiheadAttention,)),
    ("conv", (nn.modules.conv._ConvNd,)),
    ("embedding", (nn.Embedding, nn.EmbeddingBag)),
    ("linear", (nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)),
    ("norm", (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)),
)


def _kind(module: nn.Module) -> str:
    """What a module is, whatever its class is called."""
    for kind, classes in _KINDS:
        if isinstance(module, classes):
            return kind
    # transformers' linear layer with its weight transposed, which needs no import to be known.
    is_conv1d = any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
    return "linear" if is_conv1d else ""
