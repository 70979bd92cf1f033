"""What a tree tells of its parameters: names, shapes, what stands beside, and classes if any."""

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cruxy_control.roles import Label, Parameter, Rule, check_rules, label, own_index, says_norm
from cruxy_optax._low_bit import is_low_bit
from cruxy_optax._tree import at

_KINDS = {
    name: kind
    for kind, group in {
        "linear": "Dense DenseGeneral Einsum Linear LinearGeneral LoRALinear",
        "conv": "Conv Conv1d Conv2d Conv3d ConvLocal ConvTranspose",
        "embedding": "Embed Embedding",
        "norm": "BatchNorm GroupNorm InstanceNorm LayerNorm RMSNorm",
        "attention": "MultiHeadAttention MultiHeadDotProductAttention MultiheadAttention "
        "SelfAttention",
    }.items()
    for name in group.split()
}
"""What the layers of Flax and Equinox are."""


class Leaf(NamedTuple):
    """A parameter of a tree, and what it is.

    Attributes:
        name: its path, dotted.
        value: the array, without a box of nnx around it, or the `MaskedNode` in its place.
        parameter: what is known of it.
        label: what it is.
        box: where what is said of it has to stand in one too.
    """

    name: str
    value: Any
    parameter: Parameter
    label: Label
    box: Any = None

    def said(self, value: Any) -> Any:
        """What is said of it, as it stands in its place."""
        return value if self.box is None else jax.tree.map(lambda _: value, self.box)


class Labelled(NamedTuple):
    """A tree of parameters, flat, each with its box if it has one, and what each of them is."""

    leaves: list[Leaf]
    treedef: Any

    @property
    def present(self) -> list[Leaf]:
        """Those whose values are here, and not in the hands of another transformation."""
        return [leaf for leaf in self.leaves if not _is_masked(leaf.value)]

    @property
    def roles(self) -> list[str]:
        """Theirs."""
        return [leaf.label.role for leaf in self.present]

    def map(self, function: Callable[[Leaf], Any]) -> Any:
        """A tree like that of the parameters, or a prefix of it: boxes in a `State` are left out.

        So it fits what `nnx.Optimizer` gives a transformation, arrays, and what has boxes.
        """
        return self.treedef.unflatten(
            [
                leaf.value if _is_masked(leaf.value) else leaf.said(function(leaf))
                for leaf in self.leaves
            ]
        )


def labelled(params: Any, model: Any, rules: Iterable[Rule]) -> Labelled:
    """What every leaf of a tree is; see `label_roles`.

    Raises:
        ValueError: where a rule names no role, or `model` has no parameter of `params`.
        TypeError: where a rule is no such pair.
    """
    rules = check_rules(rules)
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_one)
    keys = [path for path, _ in flat]
    shapes = {_names(path): _shape(unboxed(node)) for path, node in flat}
    tree = _Tree(shapes, params if model is None else model)
    if model is not None and not any(map(tree.has, keys)):
        raise ValueError(
            f"model must have the parameters as attributes, got {type(model).__name__}, which has "
            f"none such as {'.'.join(_names(keys[0])) if keys else 'those of an empty tree'}; "
            "leave it out where names tell enough, as those of linen do."
        )
    leaves = []
    for path, node in flat:
        value = unboxed(node)
        parameter = tree.parameter(path)
        # A module takes a text for a setting of its own where it does not stand in a box.
        in_module = _is_variable(node) and _is_attribute(path)
        told = label(parameter, rules)
        leaves.append(
            Leaf(".".join(parameter.path), value, parameter, told, node if in_module else None)
        )
    return Labelled(leaves, treedef)


class _Tree:
    """The paths of a tree, and the objects on the way to its leaves where there are any."""

    def __init__(self, shapes: dict[tuple[str, ...], tuple[int, ...]], model: Any) -> None:
        self._model = model
        self._paths = shapes
        self._beside: dict[tuple[str, ...], set[str]] = {}
        for path in self._paths:
            for depth, name in enumerate(path):
                self._beside.setdefault(path[:depth], set()).add(name)
        self._last = self._last_layer()

    def has(self, keys: tuple[Any, ...]) -> bool:
        """Whether the objects have the leaf at a path."""
        nodes = self._nodes(keys)
        return len(nodes) > len(keys) and nodes[-1] is not None

    def parameter(self, keys: tuple[Any, ...]) -> Parameter:
        """What is known of a leaf."""
        path, nodes = _names(keys), self._nodes(keys[:-1])
        owners = [*map(_class, nodes), *[""] * (len(path) - len(nodes))]
        for depth, name in enumerate(path[:-1], 1):
            by_linen = re.fullmatch(r"([A-Z]\w*?)_\d+", name)
            if by_linen and not owners[depth]:
                owners[depth] = by_linen[1]
        kind = _kind(nodes[-1]) if len(nodes) == len(path) else ""
        return Parameter(
            path=path,
            shape=self._paths[path],
            owners=tuple(owners),
            kind=kind or _KINDS.get(owners[-1]) or self._kind_by_name(path),
            is_last=path[:-1] == self._last,
            place=_place(nodes),
            siblings=frozenset(self._beside[path[: own_index(path)]]),
            owned=frozenset(self._beside[path[:-1]]),
        )

    def _nodes(self, keys: tuple[Any, ...]) -> list[Any]:
        """The objects from the root to what is at a path, as far as there are any."""
        nodes = [self._model]
        for key in keys:
            try:
                nodes.append(at(nodes[-1], (key,)))
            except (AttributeError, KeyError, IndexError, TypeError):
                break
        return nodes

    def _kind_by_name(self, path: tuple[str, ...]) -> str:
        """What the owner is by the names of its parameters, which are those of Flax."""
        own, shape = self._beside[path[:-1]], self._paths[path]
        if "kernel" in own:
            if len(path) > 1 and "conv" in path[-2].lower():
                return "conv"
            return "linear" if len(shape) < 4 else ""
        if "w" in own:  # Haiku's, of which a norm's may be stacked
            same = self._paths.get((*path[:-1], "b")) == self._paths.get((*path[:-1], "w"))
            return "norm" if same and len(path) > 1 and says_norm(path[-2]) else ""
        return "norm" if "scale" in own and path[-1] in ("scale", "bias") else ""

    def _last_layer(self) -> tuple[str, ...] | None:
        """The path of the linear layer at the end of a model, where it or a chain there holds one.

        Objects have the order in which they were made; dictionaries have none.
        """
        node, path, inside = self._model, (), False
        while _kind(node) != "linear":
            held = [((*path, *names), child) for names, child in _held(node)]
            held = [one for one in held if one[0] in self._beside or one[0] in self._paths]
            own = any(where in self._paths for where, _ in held)
            if not held or own or (inside and not _chain(node)):
                return None
            inside = inside or len(held) > 1  # what holds one part alone is a wrapper
            path, node = held[-1]
        return path


def _chain(node: Any) -> list[Any]:
    """The layers of a chain; none of anything else."""
    return list(getattr(node, "layers", ())) if type(node).__name__ == "Sequential" else []


def _place(nodes: list[Any]) -> tuple[int, int]:
    """Which of the linear layers of its chain the last object is, and how many there are."""
    chains = [layers for layers in map(_chain, nodes) if layers]
    linear = [layer for layer in chains[-1] if _kind(layer) == "linear"] if chains else []
    held = [any(layer is node for node in nodes) for layer in linear]
    return (held.index(True) + 1, len(linear)) if any(held) else (0, 0)


def _held(node: Any) -> list[tuple[tuple[str, ...], Any]]:
    """What an object holds and the names that lead to it, in order."""
    if _chain(node):
        return [(("layers", str(index)), layer) for index, layer in enumerate(_chain(node))]
    if isinstance(node, Mapping) or not hasattr(node, "__dict__"):
        return []
    return [((name,), child) for name, child in vars(node).items()]


def _kind(node: Any) -> str:
    """What a layer is by its class, or by one that it is derived from."""
    kinds = (_KINDS.get(base.__name__) for base in type(node).__mro__)
    return next((kind for kind in kinds if kind), "")


def _class(node: Any) -> str:
    """The name of its class, where that is one that somebody wrote for it."""
    if isinstance(node, Mapping | list | tuple) or type(node).__module__ == "builtins":
        return ""
    return type(node).__name__


def _names(keys: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys of a path as names; of an array alone it is empty, and it is called `params`."""
    return tuple(map(_name, keys)) or ("params",)


def _name(key: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _shape(value: Any) -> tuple[int, ...]:
    if _is_masked(value):
        return ()
    return value.layout.shape if is_low_bit(value) else jnp.shape(value)


def unboxed(node: Any) -> Any:
    """The array in a box of nnx; what is none as it is, a `MaskedNode` where nothing is in it."""
    if not _is_variable(node):
        return node
    inside = jax.tree.leaves(node, is_leaf=lambda n: is_low_bit(n) or _is_masked(n))
    return inside[0] if inside else optax.MaskedNode()


def _is_one(node: Any) -> bool:
    """Whether it counts as one leaf."""
    return is_low_bit(node) or _is_masked(node) or _is_variable(node)


def _is_attribute(path: tuple[Any, ...]) -> bool:
    return bool(path) and isinstance(path[-1], jax.tree_util.GetAttrKey)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _is_variable(node: Any) -> bool:
    """Whether it is a box of nnx around an array, whose own key says nothing."""
    nnx: Any = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Variable)
