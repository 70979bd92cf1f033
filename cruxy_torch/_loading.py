"""Loading what `state_dict` gave: checked first, then copied into the tensors that are here."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from cruxy_torch import _law_state
from cruxy_torch._law_state import KEY
from cruxy_torch._memory.state import SHAPED, check_shapes, check_shards, restored

_MAY_LACK = {
    "state_bits", "relative_limit", "averaging", "average_bits", "interpolation", "decay_vectors",
    "differentiable", "power",
}  # fmt: skip
"""Options that a state of an earlier version may lack, and torch's own."""

_OF_THE_MODEL = ("role", "stacked")
"""What a parameter is, which follows from the model and not from a file."""


def load(
    optimizer: Any,
    law_state: dict[str, Tensor],
    state_dict: dict[str, Any],
    base: Callable[[dict[str, Any]], None],
) -> None:
    """Loads a state, or raises and leaves the optimizer as it was.

    Args:
        optimizer: the `ControlledOptimizer` into which.
        law_state: its law's state, whose tensors stay.
        state_dict: the state.
        base: `load_state_dict` of torch's base class, whose casts are undone.

    Raises:
        ValueError: where the state belongs to another optimizer or another law.
    """
    old = {param: dict(state) for param, state in optimizer.state.items()}
    known = [
        {name: group[name] for name in _OF_THE_MODEL if group.get(name) is not None}
        for group in optimizer.param_groups
    ]
    final: dict[str, Any] = {}

    def capture(_: Optimizer, state_dict: dict[str, Any]) -> None:
        final.update(state_dict)
        _law_state.check(law_state, state_dict["param_groups"][0].get(KEY))
        _check_options(optimizer, state_dict["param_groups"][0])
        _check_shapes(optimizer, state_dict)

    def restore(_: Optimizer) -> None:
        _law_state.load(law_state, optimizer.param_groups[0][KEY])
        optimizer.param_groups[0][KEY] = law_state
        # Undoes the casts of the base class, and keeps tensors that are there already.
        for group, own in zip(optimizer.param_groups, known, strict=False):
            group.update(own)
        saved_ids = (i for group in final["param_groups"] for i in group["params"])
        for group in optimizer.param_groups:
            for param in group["params"]:
                saved = final["state"].get(next(saved_ids))
                if saved is not None:
                    dtype = optimizer._saved_dtype(param, group)
                    optimizer.state[param] = restored(param, old.get(param, {}), saved, dtype)

    # Hooks of the user may change the dictionary before us and look at the result after us.
    before = optimizer.register_load_state_dict_pre_hook(capture)
    after = optimizer.register_load_state_dict_post_hook(restore, prepend=True)
    try:
        base(state_dict)
    finally:
        before.remove()
        after.remove()


def _check_shapes(optimizer: Any, saved: dict[str, Any]) -> None:
    """Raises unless what was saved of each parameter has its shape."""
    saved_ids = [i for group in saved["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if len(saved_ids) == len(params):  # else torch says so
        states = [saved["state"].get(i, {}) for i in saved_ids]
        for param, state in zip(params, states, strict=True):
            check_shards(param, state)
        check_shapes(params, states, SHAPED)


def _check_options(optimizer: Any, saved: dict[str, Any]) -> None:
    """Raises unless a group has the options of this optimizer's groups."""
    ours, theirs = optimizer.defaults.get("direction"), saved.get("direction")
    if ours != theirs:
        raise ValueError(
            f"the state must be one of the direction {ours or 'that comes with the mode'!s}, got "
            f"one of {theirs or 'that which comes with the mode'!s}; build the optimizer with the "
            "direction it was saved with."
        )
    missing = optimizer.defaults.keys() - saved.keys() - _MAY_LACK
    if missing:
        raise ValueError(
            f"the state must be one of {type(optimizer).__name__}, got one whose groups lack "
            f"{sorted(missing)} and have {sorted(saved.keys() - {'params', KEY})}; load it into an "
            "optimizer of the class that saved it."
        )
