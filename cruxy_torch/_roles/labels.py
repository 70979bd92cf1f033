"""`label_roles` and `role_mask`: what each parameter is, and which are of some roles."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from cruxy_control.roles import TRANSPARENT, Rule, check_keys, matching
from cruxy_torch._roles.parameters import Found, find


def label_roles(model: nn.Module, rules: Iterable[Rule] = ()) -> dict[str, str]:
    """What each parameter of a model is, by name.

    Roles are those of `cruxy_control.roles.ROLES`. They come from the user's rules, LoRA's names,
    the classes, the model's output, and the names inside and beside an attention or an MLP, in this
    order; what nothing tells is a `"vector"` or a `"matrix"`. Wrappers (PEFT, `fully_shard`,
    `torch.compile`, `DistributedDataParallel`, parametrizations) are passed through. No value is
    read: a model on the `meta` device will do.

    Args:
        model: any; a parameter that has several names stands under the first. A tied weight is an
            `"embedding"`.
        rules: pairs that come first, in their order: a shell pattern for the name or a function
            `(name, parameter) -> bool` of that and a `cruxy_control.roles.Parameter`, and a role.

    Returns:
        The role of each parameter, in the order of `model.named_parameters()`.

    Raises:
        ValueError: where a rule names no role, a parameter is shared in two roles that are not
            embedding and head, or weights have lost their shapes, as `FullyShardedDataParallel` and
            ZeRO-3 flatten them.
        TypeError: where `model` is no module, or a rule no pair.

    Examples:
        >>> import torch
        >>> import cruxy_torch
        >>> layer = torch.nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32)
        >>> roles = cruxy_torch.label_roles(layer)
        >>> roles["self_attn.in_proj_weight"], roles["linear1.weight"], roles["norm1.bias"]
        ('attention.qkv', 'mlp.up', 'norm.bias')
    """
    return {found.names[0]: found.label.role for found in find(model, rules)}


class RoleMask:
    """The parameters of some roles: holds names and tensors, and is a function of a tensor.

    `name in mask` and `mask(tensor)` tell whether a parameter is one of them; iterated, it gives
    their names. It knows the tensors of the model it was made of. Names that wrappers such as
    `torch.compile` put into a path make no difference.
    """

    def __init__(self, found: Iterable[Found], keys: tuple[str, ...]) -> None:
        table = dict.fromkeys(keys, True)
        self._keys = keys
        self._chosen: dict[Tensor, bool] = {}
        self._names: dict[str, bool] = {}
        self._first: list[str] = []
        for one in found:
            chosen = matching(table, one.label.role, False)
            self._chosen[one.tensor] = chosen
            self._names.update(dict.fromkeys(one.names, chosen))
            self._first += one.names[:1] * chosen
        self._bare = {_bare(name): chosen for name, chosen in self._names.items()}

    def __call__(self, tensor: Tensor) -> bool:
        """Whether a parameter of the model is of these roles.

        Raises:
            ValueError: where it is no parameter of the model.
        """
        if tensor not in self._chosen:
            raise ValueError(
                "a mask must be asked for a parameter of its model, got another of shape "
                f"{tuple(tensor.shape)}; make it after the model is sharded, cast or loaded."
            )
        return self._chosen[tensor]

    def __contains__(self, name: str) -> bool:
        return self._names.get(name, self._bare.get(_bare(name), False))

    def __iter__(self) -> Iterator[str]:
        return iter(self._first)

    def __len__(self) -> int:
        return len(self._first)

    def __repr__(self) -> str:
        return f"RoleMask({', '.join(map(repr, self._keys))}: {len(self)} of {len(self._chosen)})"


def _bare(name: str) -> str:
    """A name without those of wrappers."""
    return ".".join(part for part in name.split(".") if part not in TRANSPARENT)


def role_mask(model: nn.Module, *keys: str, rules: Iterable[Rule] = ()) -> RoleMask:
    """The parameters of some roles, for what takes a choice of parameters.

    Args:
        model: any.
        keys: roles, or their beginnings: `"attention"` is all of attention.
        rules: see `label_roles`.

    Returns:
        What tells by name (`name in mask`) or by tensor (`mask(tensor)`, as
        `CruxyOptimizer(select=mask)` asks) whether a parameter is of these roles, and gives the
        names.

    Raises:
        ValueError: where there is no key, or one is no role; see `label_roles`.

    Examples:
        Muon's matrices: those inside the layers, not the embedding and not the head.

        >>> import torch
        >>> import cruxy_torch
        >>> model = torch.nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32)
        >>> matrices = cruxy_torch.role_mask(model, "attention", "mlp", "moe.expert")
        >>> list(matrices)[:3]
        ['self_attn.in_proj_weight', 'self_attn.out_proj.weight', 'linear1.weight']
        >>> rest = [p for p in model.parameters() if not matrices(p)]
        >>> len(rest)
        8

        Moments in 8 bits of these alone:

        >>> optimizer = cruxy_torch.CruxyOptimizer(
        ...     model.parameters(), state_bits=8, select=matrices
        ... )
    """
    if not keys:
        raise ValueError('role_mask must be given roles, got none; for instance "attention".')
    found = find(model, rules)
    check_keys("role_mask", keys, (one.label.role for one in found))
    return RoleMask(found, keys)
