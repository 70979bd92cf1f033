"""Loading what `state_dict` gave: checked first, then copied into the tensors that are here."""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from cruxy_control.formulas.averaging import pulls
from cruxy_torch import _checks, _law_state
from cruxy_torch._law_state import KEY
from cruxy_torch._memory.state import SHAPED, check_shapes, check_shards, restored

_MAY_LACK = {
    "state_bits", "relative_limit", "averaging", "average_bits", "interpolation", "decay_vectors",
    "differentiable", "power", "ends",
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
        ValueError: where this is no state, or one of another optimizer or another law.
    """
    old = {param: dict(state) for param, state in optimizer.state.items()}
    known = [
        {name: group[name] for name in _OF_THE_MODEL if group.get(name) is not None}
        | ({"ends": True} if group.get("ends") else {})
        for group in optimizer.param_groups
    ]
    final: dict[str, Any] = {}

    def capture(_: Optimizer, state_dict: dict[str, Any]) -> None:
        final.update(state_dict)
        check_form(state_dict)
        groups = state_dict["param_groups"]
        _law_state.check_form(groups[0].get(KEY))
        _check_options(optimizer, groups)
        _law_state.check(law_state, groups[0][KEY], optimizer._settings.law)
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

    if not isinstance(state_dict, Mapping):  # else after the hooks that may change it
        check_form(state_dict)
    # Hooks of the user may change the dictionary before us and look at the result after us.
    before = optimizer.register_load_state_dict_pre_hook(capture)
    after = optimizer.register_load_state_dict_post_hook(restore, prepend=True)
    try:
        base(state_dict)
    finally:
        before.remove()
        after.remove()


def check_form(saved: Any) -> None:
    """Raises unless this is what `state_dict` of an optimizer gives.

    Raises:
        ValueError: where it is something else.
    """
    whole = saved if isinstance(saved, Mapping) else {}
    groups: Any = whole.get("param_groups")
    state: Any = whole.get("state")
    fine = isinstance(groups, list | tuple) and len(groups) > 0 and isinstance(state, Mapping)
    fine = fine and all(isinstance(g, Mapping) and "params" in g for g in groups)
    own = (state.get(i, {}) for group in groups for i in group["params"]) if fine else ()
    if not fine or not all(isinstance(of_param, Mapping) for of_param in own):
        raise ValueError(
            'the state must be a dictionary of "state", by parameter, and "param_groups", at least '
            f"one and each with its params, got {reprlib.repr(saved)}; only what state_dict() gave "
            "can be loaded."
        )


def _check_shapes(optimizer: Any, saved: dict[str, Any]) -> None:
    """Raises unless what was saved of each parameter has its shape."""
    saved_ids = [i for group in saved["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if len(saved_ids) == len(params):  # else torch says so
        states = [saved["state"].get(i, {}) for i in saved_ids]
        for param, state in zip(params, states, strict=True):
            check_shards(param, state)
        groups = enumerate(optimizer.param_groups)
        called = [name for index, group in groups for name in _checks.called(group, index)]
        remedy = "load it beside a model with the shapes that it was saved with"
        check_shapes(params, states, SHAPED, called=called, remedy=remedy)


def _check_options(optimizer: Any, saved: Sequence[dict[str, Any]]) -> None:
    """Raises unless groups have the options of this optimizer's, and the same method.

    Rates, decays, bits and what else may change on the way come from the file.
    """
    wanted = optimizer.defaults.keys() - _MAY_LACK - {"direction"}
    for index, (here, there) in enumerate(zip(optimizer.param_groups, saved, strict=False)):
        if missing := sorted(wanted - there.keys()):
            raise ValueError(
                f"the state must be one of {type(optimizer).__name__}, got one whose groups lack "
                f"{missing} and have {sorted(there.keys() - {'params', KEY})}; load it into an "
                "optimizer of the class that saved it."
            )
        theirs = _method(there)
        for name, (what, shown) in _method(here).items():
            if name in theirs and what != theirs[name][0]:
                got = f"{name}={theirs[name][1]!r}"
                raise ValueError(
                    f"the state must be one of {name}={shown!r} in group {index}, as the optimizer "
                    f"is, got one of {got}; build the optimizer as it was when this was saved, "
                    f"with {got}."
                )


def _method(group: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The options of which another makes another optimizer: what counts, and how it is shown.

    A group of before there was a pull does not say whether the average does so.
    """
    direction, lion = group.get("direction"), bool(group.get("use_lion"))
    method = {"direction": (direction, direction), "use_lion": (lion, lion)}
    if "interpolation" in group:
        pull = group["interpolation"] if group.get("averaging") is not None else 0.0
        method["interpolation"] = (pulls(pull), pull)
    return method
