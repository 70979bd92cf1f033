"""What a parameter is: an embedding, a query, a gate, a bias, from what a framework tells of it.

A role comes from, in this order: the user's rules; LoRA's names; the class of the owner; whether
the owner makes the model's output; the names, read inside the nearest part that says attention or
MLP; the shape. What nothing tells is a `vector` or a `matrix`, never another's role.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from cruxy_control import _role_names as names
from cruxy_control._role_decision import decide, is_bias, is_vector
from cruxy_control._role_paths import Parameter, read

V = TypeVar("V")

TRANSPARENT = names.TRANSPARENT
"""Names under which wrappers hold what they wrap."""

says_norm = names.says_norm
"""Whether a name says that it normalises."""

ROLES = (
    *("embedding", "position", "norm", "norm.bias", "bias", "conv", "head"),
    *("attention.q", "attention.k", "attention.v", "attention.qkv", "attention.kv"),
    *("attention.q.a", "attention.q.b", "attention.kv.a", "attention.kv.b", "attention.out"),
    *("mlp.up", "mlp.gate", "mlp.gate_up", "mlp.down"),
    "moe.router",
    *("moe.expert.up", "moe.expert.gate", "moe.expert.gate_up", "moe.expert.down"),
    *("ssm.in", "ssm.x", "ssm.dt", "ssm.out", "ssm.a", "ssm.d"),
    *("lora.a", "lora.b", "lora.scale"),
    *("vector", "matrix"),
)
"""All roles there are.

- `embedding`: is looked up; `head`: makes the output. A tied weight is an embedding.
- `position`: embeddings and tables of positions, and learned vectors with a place of their own in
  the sequence, such as ViT's class token.
- `norm`, `norm.bias`: what a normalisation multiplies by and adds; `bias`: what others add.
- `conv`: a convolution's weight wherever it stands: what makes patches, or the output, included.
- `attention.*`: `qkv` and `kv` are fused; `.a` and `.b` are factors of a projection of low rank.
- `mlp.*`: `gate_up` is fused. Shared experts, which see every token, are MLPs.
- `moe.*`: what chooses experts, and the experts. `ssm.*`: Mamba's; `a` is `A_log`, `d` is `D`.
- `lora.*`: the two factors, and magnitudes (DoRA, AdaLoRA).
- `vector`, `matrix`: nothing tells more than the shape.
"""

_KEYS = {role[:i] for role in ROLES for i in [*(m.start() for m in re.finditer(r"\.", role)), None]}
_NOT_DECAYED = {"norm", "norm.bias", "bias", "position", "vector", "lora.scale", "ssm.a", "ssm.d"}


class Label(NamedTuple):
    """What a parameter is.

    Attributes:
        role: one of `ROLES`.
        of: for a `bias` the role of the weight it belongs to, for `lora.*` that of the weight that
            is adapted; else `None`.
        decided_by: `"rule"`, `"name"`, `"class"`, `"context"` (what stands around or beside it) or
            `"shape"`.
    """

    role: str
    of: str | None
    decided_by: str


Rule = tuple[str | Callable[[str, Parameter], bool], str]
"""A pattern for the dotted path, or a function of that and the parameter, and the role."""


def label(parameter: Parameter, rules: Iterable[Rule] = ()) -> Label:
    """What a parameter is.

    Args:
        parameter: what is known of it.
        rules: pairs that come before everything else, the first that matches counts: a shell
            pattern for the dotted path (`"*.adapter.*"`), or a function of the dotted path and the
            `Parameter`, and a role.

    Returns:
        Its role, what it belongs to, and what told so.

    Raises:
        ValueError: where a rule names no role.
        TypeError: where a rule is no such pair.

    Examples:
        >>> from cruxy_control.roles import Parameter, label
        >>> label(Parameter(("h", "0", "attn", "c_attn", "bias"), (96,)))
        Label(role='bias', of='attention.qkv', decided_by='name')
        >>> label(Parameter(("net", "0", "kernel"), (8, 8)), rules=[("net.*", "mlp.up")]).role
        'mlp.up'
    """
    dotted = ".".join(parameter.path)
    for rule, role in check_rules(rules):
        if rule(dotted, parameter) if callable(rule) else fnmatch.fnmatchcase(dotted, rule):
            return Label(role, None, "rule")
    return _lora(parameter) or _plain(parameter)


def own_index(path: tuple[str, ...]) -> int:
    """Where in a path the name stands that says what the parameter is: its own or its owner's.

    Examples:
        >>> from cruxy_control.roles import own_index
        >>> own_index(("layers", "0", "fc1", "base_layer", "weight"))
        2
        >>> own_index(("layers", "0", "experts", "gate_up_proj"))
        3
    """
    at = adapter_index(path)
    return read(path if at is None else (*path[:at], "weight")).own.index


def matching(table: Mapping[str, V], role: str, default: V) -> V:
    """The value whose key is the role or begins it; the longest key wins.

    Examples:
        >>> from cruxy_control.roles import matching
        >>> matching({"attention": 2.0, "attention.q": 3.0}, "attention.q.a", 1.0)
        3.0
        >>> matching({"norm": 3.0}, "bias", 1.0)
        1.0
    """
    while role and role not in table:
        role = role.rpartition(".")[0]
    return table[role] if role else default


def check_keys(name: str, table: Iterable[str], present: Iterable[str]) -> None:
    """Raises unless every key is a role or the beginning of one; one of no parameter may be named.

    Args:
        name: what the user calls the table.
        table: its keys.
        present: the roles that the model has, for the message.

    Raises:
        ValueError: with the key and the roles that are present.
    """
    for key in table:
        if key not in _KEYS:
            raise ValueError(
                f"the keys of {name} must be roles or beginnings of them, got {key!r}; this model "
                f"has {', '.join(sorted(set(present)))}."
            )


def check_rules(rules: Iterable[Rule]) -> Sequence[Rule]:
    """Raises unless rules are pairs of a pattern or a function, and a role; returns them.

    Raises:
        ValueError: where a rule names no role.
        TypeError: where a rule is no such pair.
    """
    rules = tuple(rules)
    for rule in rules:
        if not (isinstance(rule, tuple) and len(rule) == 2) or not (
            isinstance(rule[0], str) or callable(rule[0])
        ):
            raise TypeError(
                "a rule must be a pair of a pattern or a function, and a role, got "
                f'{rule!r}; for instance ("*.adapter.*", "head").'
            )
        if rule[1] not in ROLES:
            raise ValueError(
                f"the role of a rule must be one of {', '.join(ROLES)}, got {rule[1]!r}; "
                '"matrix" and "vector" are what nothing is known of.'
            )
    return rules


def is_decayed(label: Label, parameter: Parameter) -> bool:
    """Whether weight decay acts on a parameter where the user says nothing.

    Not on norms, biases, positions, vectors and magnitudes, nor on Mamba's `A_log` and `D`; on a
    `matrix` where its owner is a linear layer or a convolution, or it is called `weight`, `kernel`
    or `w` and its owner no norm, or it is a factor of PEFT's LoHa or LoKr.

    Examples:
        >>> from cruxy_control.roles import Parameter, is_decayed, label
        >>> weight, bare = (Parameter(("mixer", name), (8, 8)) for name in ("weight", "decay"))
        >>> is_decayed(label(weight), weight), is_decayed(label(bare), bare)
        (True, False)
    """
    if label.role == "matrix":
        leaf, own = read(parameter.path)[:2]
        is_weight = leaf.lower() in ("weight", "kernel", "w") and not is_vector(parameter.shape)
        layer = parameter.kind in ("linear", "conv")
        factor = any(names.FACTORS.match(name) for name in parameter.path)
        return layer or factor or (is_weight and not names.says_norm(own.text))
    return label.role not in _NOT_DECAYED


def adapter_index(path: tuple[str, ...]) -> int | None:
    """Where LoRA's own names begin in a path, behind what they adapt; `None` without any.

    Examples:
        >>> from cruxy_control.roles import adapter_index
        >>> adapter_index(("attn", "q_proj", "lora_A", "default", "weight"))
        2
    """
    return next((i for i, name in enumerate(path) if names.LORA.match(name)), None)


def _lora(parameter: Parameter) -> Label | None:
    """LoRA's own parameters, of the weight they adapt."""
    path = parameter.path
    at = adapter_index(path)
    if at is None:
        return None
    match = names.LORA.match(path[at])
    side = match["side"] if match else None
    role = f"lora.{side.lower()}" if side else "lora.scale"
    if path[-1] == "bias" and at < len(path) - 1:
        return Label("bias", role, "name")
    base = parameter._replace(
        path=(*path[:at], "weight"), shape=(0, 0), owners=parameter.owners[: at + 1]
    )
    return Label(role, _plain(base).role, "name")


def _plain(parameter: Parameter) -> Label:
    """What a parameter is that no rule names and no adapter brings."""
    reading = read(parameter.path, parameter.owners)
    role, decided_by = decide(parameter, reading)
    leaf = reading.leaf.lower()
    if role == "position":
        return Label(role, None, decided_by)
    if is_bias(parameter, leaf):
        if role == "norm":
            return Label("norm.bias", None, decided_by)
        return Label("bias", None if role in ("vector", "embedding") else role, "name")
    if leaf == "weight_g" and is_vector(parameter.shape):
        return Label("vector", None, "name")
    return Label(role, None, decided_by)
