"""`param_groups`: a group for each role, with its rate and decay, for any optimizer."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from cruxy_control.checks import check_range
from cruxy_control.roles import Rule, check_keys, is_decayed, matching
from cruxy_torch import _checks
from cruxy_torch._roles.parameters import Found, find


def param_groups(
    model: nn.Module,
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    rates: Mapping[str, float] | None = None,
    decays: Mapping[str, float] | None = None,
    rules: Iterable[Rule] = (),
) -> list[dict[str, Any]]:
    """Groups of a model's parameters by role, for any `torch.optim` optimizer.

    Without `rates` and `decays` every rate is `lr`, and only what is usually decayed is: not norms,
    biases, positions, vectors and LoRA's magnitudes, nor matrices that are no layer's weight.

    Keys of `rates` and `decays` are roles or their beginnings, and the longest that fits a
    parameter counts: `"attention"` is all of attention but what `"attention.q"` takes. A bias is a
    `"bias"`, whatever it belongs to.

    torch 2.6 and newer wants `param_names` in all groups of an optimizer or in none: a group of
    your own beside these, or one that is added later, needs them too, as in
    `{"params": [extra], "param_names": ["extra"]}`.

    Args:
        model: its parameters that require a gradient are taken, each once.
        lr: learning rate, at least 0; a number or a tensor of one element, of which each group gets
            a copy of its own.
        weight_decay: at least 0, of parameters that are decayed.
        rates: by role, what multiplies `lr`; finite and at least 0. `{"lora.b": 16}` is LoRA+.
        decays: by role, what multiplies `weight_decay`; finite and at least 0. 1 decays what is not
            decayed otherwise, 0 does not decay.
        rules: see `label_roles`.

    Returns:
        Dictionaries with `params`, `lr`, `weight_decay`, and for reading `role` and `param_names`.
        A role has two where some of its parameters are decayed and others not.

    Raises:
        ValueError: where a number is outside its range, a key is no role, `decays` says what no
            `weight_decay` is multiplied by, or no parameter requires a gradient; see `label_roles`.

    Examples:
        >>> import torch
        >>> import cruxy_torch
        >>> layer = torch.nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32)
        >>> groups = cruxy_torch.param_groups(
        ...     layer, lr=1e-3, weight_decay=0.1, rates={"norm": 3, "mlp.down": 0.5}
        ... )
        >>> optimizer = torch.optim.AdamW(groups)
        >>> for group in optimizer.param_groups:
        ...     print(group["role"], len(group["params"]), group["lr"], group["weight_decay"])
        attention.qkv 1 0.001 0.1
        bias 4 0.001 0.0
        attention.out 1 0.001 0.1
        mlp.up 1 0.001 0.1
        mlp.down 1 0.0005 0.1
        norm 2 0.003 0.0
        norm.bias 2 0.003 0.0

    References:
        Hayou, Ghosh and Yu, [LoRA+: Efficient Low Rank Adaptation of Large
        Models](https://arxiv.org/abs/2402.12354), 2024, for the rate of `lora.b`.
    """
    _checks.check_lr(lr)
    remedy = "0 switches it off"
    check_range("weight_decay", weight_decay, 0.0, math.inf, upper_open=True, remedy=remedy)
    found = find(model, rules)
    factors = Factors(found, rates, decays)
    if weight_decay == 0.0 and any(factors.decays.values()):
        raise ValueError(
            f"decays multiply weight_decay, which must be above 0 with them, got {weight_decay!r}; "
            "give it too, for instance 0.1."
        )
    trained = [one for one in found if one.tensor.requires_grad]
    if not trained:
        raise ValueError(
            "some parameter must require a gradient, got a model in which none does; call "
            "requires_grad_() on what is to be trained."
        )
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for one in trained:
        rate, decay = factors.of(one)
        group = groups.get((one.label.role, decay))
        if group is None:
            group = {
                "params": [],
                "param_names": [],
                "lr": lr.detach() * rate if isinstance(lr, Tensor) else lr * rate,
                "weight_decay": weight_decay * decay,
                "role": one.label.role,
            }
            groups[one.label.role, decay] = group
        group["params"].append(one.tensor)
        group["param_names"].append(one.names[0])
    return list(groups.values())


class Factors:
    """What multiplies the rate and the decay of each parameter, checked."""

    def __init__(
        self,
        found: Iterable[Found],
        rates: Mapping[str, float] | None,
        decays: Mapping[str, float] | None,
    ) -> None:
        present = {one.label.role for one in found}
        self.rates = _checked("rates", rates, present)
        self.decays = _checked("decays", decays, present)

    def of(self, found: Found) -> tuple[float, float]:
        """The two of a parameter."""
        role = found.label.role
        usual = 1.0 if is_decayed(found.label, found.parameter) else 0.0
        return matching(self.rates, role, 1.0), matching(self.decays, role, usual)


def _checked(
    name: str, table: Mapping[str, float] | None, present: Iterable[str]
) -> dict[str, float]:
    table = {} if table is None else dict(table)
    check_keys(name, table, present)
    remedy = "1 changes nothing, 0 switches it off"
    for key, value in table.items():
        check_range(f"{name}[{key!r}]", value, 0.0, math.inf, upper_open=True, remedy=remedy)
    return table
