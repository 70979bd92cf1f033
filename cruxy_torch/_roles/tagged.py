"""`build_tagged_param_groups`: `param_groups` with Tiger's rates, for slices of q, k, v too."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from cruxy_control import tagged
from cruxy_control.roles import Rule
from cruxy_control.slices import Slices
from cruxy_torch._roles.groups import param_groups
from cruxy_torch._roles.layouts import slices_in
from cruxy_torch._roles.parameters import find

SLICE_RATES = tuple(tagged.SLICE_RATES.values())
"""What Tiger multiplies the rates of q, k and v by in a tensor that holds all three."""

_NOT_DECAYED: tuple[str, ...] = ("bias", "norm", "embedding", "position", "lora")


def build_tagged_param_groups(
    model: nn.Module,
    base_lr: float | Tensor = 1e-3,
    base_wd: float = 0.01,
    enable_qkv_slicing: bool = False,
    *,
    rules: Iterable[Rule] = (),
) -> list[dict[str, Any]]:
    """`param_groups` with Tiger's rates: half for norms, embeddings and biases, 1.1 for `mlp.up`.

    Biases, norms, embeddings, positions and LoRA's matrices are not decayed. What a parameter is,
    `label_roles` says; Tiger's own tags go by substrings and miss GPT-2's and LLaMA's names.

    Args:
        model: its parameters that require a gradient are taken.
        base_lr: learning rate, at least 0; a number or a tensor of one element.
        base_wd: weight decay of what is decayed, at least 0.
        enable_qkv_slicing: gives q, k and v rates of 0.9, 0.8 and 1.1 where one tensor holds them;
            such groups are for `Tiger` alone.
        rules: see `label_roles`.

    Returns:
        Dictionaries for an optimizer; sliced ones have `slices` and `slice_rates`.

    Raises:
        ValueError: where a number is outside its range, or, with slicing, where it is not known how
            a tensor holds q, k and v; see `qkv_slices`.

    Examples:
        >>> import torch
        >>> import cruxy_torch
        >>> layer = torch.nn.MultiheadAttention(8, num_heads=2)
        >>> groups = cruxy_torch.build_tagged_param_groups(
        ...     layer, base_lr=1e-3, enable_qkv_slicing=True
        ... )
        >>> for group in groups:
        ...     print(group["role"], group["lr"], group["weight_decay"], group.get("slice_rates"))
        attention.qkv 0.001 0.01 (0.9, 0.8, 1.1)
        bias 0.0005 0.0 None
        attention.out 0.001 0.01 None
    """
    decays = dict.fromkeys(_NOT_DECAYED, 0.0)
    rules = tuple(rules)
    groups = param_groups(
        model, lr=base_lr, weight_decay=base_wd, rates=tagged.RATES, decays=decays, rules=rules
    )
    if not enable_qkv_slicing:
        return groups
    trained = (one for one in find(model, rules) if one.tensor.requires_grad)
    layouts = slices_in(model, trained, {})
    return [part for group in groups for part in _sliced(group, layouts)]


def _sliced(group: dict[str, Any], layouts: dict[str, Slices]) -> list[dict[str, Any]]:
    """A group as it is, or one for each layout of q, k and v in it."""
    if group["role"] not in ("attention.qkv", "attention.kv"):
        return [group]
    by_layout: dict[Slices, dict[str, Any]] = {}
    for param, name in zip(group["params"], group["param_names"], strict=True):
        own = {**group, "params": [], "param_names": [], "slice_rates": SLICE_RATES}
        if isinstance(own["lr"], Tensor):
            own["lr"] = own["lr"].clone()  # a scheduler changes each in place
        own = by_layout.setdefault(layouts[name], own)
        own["params"].append(param)
        own["param_names"].append(name)
    return [{**own, "slices": tuple(slices)} for slices, own in by_layout.items()]
