"""What a module tells of its parameters: owners, what stands beside, what makes the output."""

from collections.abc import Iterable, Iterator
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
        ValueError: where a rule names no role, two modules share a parameter in two roles, or
            weights are flat, as FSDP of old and ZeRO-3 make them.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; roles need its modules."
        )
    rules = check_rules(rules)
    tree = _Tree(model)
    named: dict[Tensor, list[str]] = {}
    for name, tensor in tree.parameters():
        named.setdefault(tensor, []).append(name)
    found: list[Found] = []
    for tensor, names in named.items():
        told = {}
        for name in names:
            tree.check_whole(name, tensor)
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


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model under all of their names, but for those that lead back."""
    return dict(_walk(model, "", ()))


def _walk(
    module: nn.Module, prefix: str, above: tuple[nn.Module, ...]
) -> Iterator[tuple[str, nn.Module]]:
    yield prefix, module
    above = (*above, module)
    for name, child in module._modules.items():
        if child is not None and all(child is not one for one in above):
            yield from _walk(child, f"{prefix}.{name}" if prefix else name, above)


class _Tree:
    """The modules of a model by their paths."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = modules_of(model)
        outputs = {id(module) for module in map(_output, self._modules.values()) if module}
        self._outputs = {name for name, m in self._modules.items() if id(m) in outputs}
        self._last = _last(model)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters of all modules by all of their names."""
        for prefix, module in self._modules.items():
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    yield (f"{prefix}.{name}" if prefix else name), tensor

    def check_whole(self, name: str, tensor: Tensor) -> None:
        """Raises where a parameter is one flat piece of what it was.

        Raises:
            ValueError: with its name, its shape and the remedy.
        """
        owner, _, leaf = name.rpartition(".")
        layer = _kind(self._modules[owner]) in ("linear", "conv", "embedding", "attention")
        is_weight = layer and leaf in ("weight", "in_proj_weight") and tensor.requires_grad
        if getattr(tensor, "_is_flat_param", False) or (is_weight and tensor.dim() < 2):
            raise ValueError(
                "the weights of a model must have the shapes of its layers, which tell roles, got "
                f"{name} of shape {tuple(tensor.shape)}, as FullyShardedDataParallel and ZeRO-3 "
                "flatten them; use fully_shard, or label the model and make its groups before it "
                "is wrapped, with use_orig_params=True."
            )

    def parameter(self, name: str, tensor: Tensor) -> Parameter:
        """What is known of a parameter under one of its names."""
        path = tuple(name.split("."))
        own = own_index(path)
        prefixes = [".".join(path[:i]) for i in range(len(path))]
        adapted = adapter_index(path)
        owner = prefixes[-1 if adapted is None else adapted]
        if "parametrizations" in path:
            owner = prefixes[path.index("parametrizations")]
        module = self._modules[owner]
        module = module if adapted is None else _unwrapped(module)
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
            owned=frozenset(self._modules[prefixes[-1]]._parameters),
        )


def _output(module: nn.Module) -> nn.Module | None:
    """The output embedding that a model names, in the manner of transformers."""
    if not hasattr(type(module), "get_output_embeddings"):
        return None
    try:
        found = module.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    except (AttributeError, NotImplementedError, TypeError):  # a part without one, or of several
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
