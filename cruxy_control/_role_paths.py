"""How the path of a parameter is read: which name says what it is, and what stands around that."""

import re
from typing import NamedTuple

from cruxy_control._role_names import LEAVES, TRANSPARENT


class Parameter(NamedTuple):
    """What a framework tells of one parameter.

    Attributes:
        path: the names from the root to it, its own the last.
        shape: its shape; of a sharded one, of the whole.
        owners: class names from the root to the owner, one for each name of the path: `owners[i]`
            is the class of what `path[:i]` leads to. `()` where unknown.
        kind: what the owner is, whatever its class is called: `"linear"`, `"conv"`, `"embedding"`,
            `"norm"`, `"attention"`, or `""` where unknown. Where there are no classes names of
            parameters tell: `kernel` is a linear's, `embedding` an embedding's, and a `bias` beside
            a `scale` a norm's.
        is_output: whether the owner makes the model's output.
        is_last: whether the owner is the last layer that the model itself, or a chain at its end,
            holds.
        place: of a linear layer in a chain of layers, which of the chain's linear layers it is,
            from 1, and how many there are; (0, 0) for any other.
        siblings: the names beside `path[own_index(path)]`, that included.
        owned: the names of what the owner holds, its own included.

    Examples:
        >>> from cruxy_control.roles import Parameter, label
        >>> beside = frozenset(["self_attn", "fc1", "fc2"])
        >>> label(Parameter(("layers", "0", "fc1", "weight"), (64, 16), siblings=beside)).role
        'mlp.up'
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    owners: tuple[str, ...] = ()
    kind: str = ""
    is_output: bool = False
    is_last: bool = False
    place: tuple[int, int] = (0, 0)
    siblings: frozenset[str] = frozenset()
    owned: frozenset[str] = frozenset()


class Name(NamedTuple):
    """One name of a path without wrappers, where it stands, and the class behind it."""

    text: str
    index: int
    cls: str = ""
    numbered: bool = False  # an element of a list, by the number behind it


class Reading(NamedTuple):
    """A path as read from its end."""

    leaf: str  # the parameter's own name
    own: Name  # the name that says what it is: the leaf's, or that of its owner
    above: tuple[Name, ...]  # the names around that, from near to far
    owner: str  # the owner's class


def read(path: tuple[str, ...], owners: tuple[str, ...] = ()) -> Reading:
    """Reads a path: wrappers are passed through, numbers go to the list they count."""
    names: list[Name] = [Name("", -1, owners[0] if owners else "")]
    inside = ""  # of parametrizations, or of what an adapter has copied
    for index, text in enumerate(path):
        cls = owners[index + 1] if index + 1 < len(owners) else ""
        if inside == "modules_to_save":  # this is the adapter's name
            inside = ""
            names[-1] = names[-1]._replace(cls=cls or names[-1].cls)
        elif text in ("parametrizations", "modules_to_save"):
            inside = text
        elif inside == "parametrizations" and re.fullmatch(r"original\d*", text):
            if text == "original0" and path[-2:] == ("weight", text):
                names[-1] = names[-1]._replace(text="weight_g")
        elif index == len(path) - 1 and text == "value" and path[index - 1] in LEAVES:
            pass  # nnx's name of what a variable holds
        elif text in TRANSPARENT:
            names[-1] = names[-1]._replace(cls=cls or names[-1].cls)
        elif text.isdigit() and len(names) > 1:
            names[-1] = names[-1]._replace(cls=cls or names[-1].cls, numbered=True)
        else:
            cls = "" if inside == "parametrizations" else cls
            names.append(Name(text, index, cls, bool(re.search(r"_\d+$", text))))
    leaf = names.pop()
    bare = leaf.text.lower() not in LEAVES or len(names) == 1
    own = leaf if bare else names[-1]
    above = names[1:] if bare else names[1:-1]
    return Reading(leaf.text, own, tuple(reversed(above)), names[-1].cls)
