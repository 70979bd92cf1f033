"""Moves a run between `cruxy_optax` and `CruxyOptimizer`, without importing JAX.

What crosses is NumPy: an Optax state is a nest of NamedTuples whose leaves NumPy can read, and what
goes back has the same nest with NumPy leaves, which JAX takes as they are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cruxy_torch import _law_state
from cruxy_torch._actuators.moments import Adam, Lion
from cruxy_torch._memory import state as _state
from cruxy_torch._optimizers.cruxy import CruxyOptimizer

_MOMENTS = ("ScaleByControlledAdamState", "ScaleByControlledLionState")


def state_from_optax(
    optimizer: CruxyOptimizer, opt_state: Any, leaves: Callable[[Any], Sequence[Any]]
) -> dict[str, Any]:
    """The `state_dict` with which `optimizer` continues what `opt_state` has begun.

    Args:
        optimizer: of the same mode and options; nothing of it changes.
        opt_state: the state of `cruxy_optax.meta3`, `meta_lion`, `self_driving`,
            `self_driving_lion`, `stability_v1` or `stability_v2`.
            Moments and averages kept in fewer bits on either side go through the values they stand
            for. Those of an average are told beside the parameters: `optimizer`'s have to be those
            that `opt_state` belongs to.
        leaves: lists the leaves of a tree like the JAX parameters in the order and layout of
            `optimizer`'s, such as `lambda tree: [tree["kernel"].T, tree["bias"]]`: the moments
            are trees like that.

    Returns:
        A new state dictionary for `optimizer.load_state_dict`.

    Raises:
        ValueError: where the state has no controller or not just one set of moments, its law or
            its direction is another than `optimizer`'s, or a leaf's shape is not its parameter's.

    Examples:
        >>> import jax.numpy as jnp, torch, cruxy_optax, cruxy_torch
        >>> tx = cruxy_optax.meta3(1e-3)
        >>> params = {"kernel": jnp.ones((3, 2))}
        >>> _, opt_state = tx.update(params, tx.init(params), params, value=1.0)
        >>> linear = torch.nn.Linear(3, 2, bias=False)
        >>> optimizer = cruxy_torch.CruxyOptimizer(linear.parameters(), lr=1e-3)
        >>> state = cruxy_torch.state_from_optax(optimizer, opt_state, lambda t: [t["kernel"].T])
        >>> optimizer.load_state_dict(state)
        >>> optimizer.telemetry()["step"]
        1
    """
    controller, moments = _parts(opt_state)
    _check_alike(optimizer, controller, moments)
    saved = optimizer.state_dict()
    law_state = saved["param_groups"][0]["controller"]
    state = controller.law_state
    names = _law_state.leaves(_law_state.names_of(state))
    values = dict(zip(names, _law_state.leaves(state), strict=True))
    values |= {name: getattr(controller, name) for name in _law_state.COUNTERS}
    ordered = controller.controls
    kept = _law_state.CONTROLS[: len(law_state["controls"])]
    values["controls"] = np.stack([np.asarray(getattr(ordered, name)) for name in kept])
    values |= {
        name: law_state[name] for name in ("report", "driven", "format") if name in law_state
    }
    for rate in _found(opt_state, ("ScaleByMetaLearningRateState",)):
        values |= {name: getattr(rate, name) for name in _law_state.APPLIED}
    saved["param_groups"][0]["controller"] = {k: _tensor(values[k]) for k in law_state}

    columns = {"exp_avg": leaves(_decoded(moments.mu))}
    adam = hasattr(moments, "nu")
    if adam:
        columns["exp_avg_sq"] = leaves(_decoded(moments.nu))
    averages = [
        (leaves(_decoded(node.average, "residues")), leaves(_decoded(node.average, "spans")))
        for node in _found(opt_state, ("AverageIteratesState",))
    ]
    params = [(param, group) for group in optimizer.param_groups for param in group["params"]]
    saved["state"] = {}
    for index, (param, group) in enumerate(params):
        state = {}
        for key, column in columns.items():
            value = _tensor(_at(column, index, len(params)))
            if value.shape != param.shape:
                raise ValueError(
                    f"{key} {index} must have its parameter's shape {tuple(param.shape)}, got "
                    f"{tuple(value.shape)}; let leaves() transpose what the two frameworks lay "
                    "out differently."
                )
            bits = optimizer._bits(group, param)
            state |= _state.moment(param, value, key, value.dtype, bits)
        if adam:
            state["beta1_product"] = _tensor(moments.mu_decay)
            state["beta2_product"] = _tensor(moments.nu_decay)
        for columns_of_average in averages:
            if group["averaging"] is not None:
                parts = [_tensor(_at(column, index, len(params))) for column in columns_of_average]
                bits = _state.bits_of(param, group["average_bits"])
                state |= _state.average(param, _beside(param, *parts), bits)
        saved["state"][index] = state
    return saved


def state_to_optax(
    optimizer: CruxyOptimizer, opt_state: Any, tree: Callable[[list[np.ndarray]], Any]
) -> Any:
    """The Optax state with which JAX continues what `optimizer` has begun.

    Args:
        optimizer: its state is copied to the host.
        opt_state: a state to take the structure from, such as `tx.init(params)` gives.
        tree: makes a tree like the JAX parameters of a list in the order and layout of
            `optimizer`'s, such as `lambda p: {"kernel": p[0].T, "bias": p[1]}`.

    Returns:
        A state like `opt_state` with NumPy leaves of the same shapes and dtypes. The signals and
        controls of the last step, which only telemetry reads, are those of `opt_state`.

    Raises:
        ValueError: where the two do not fit, or parameters have seen different numbers of steps,
            which an Optax state cannot say.
    """
    controller, moments = _parts(opt_state)
    _check_alike(optimizer, controller, moments)
    law_state = {k: v.cpu().numpy() for k, v in optimizer._law().items()}
    new: dict[str, Any] = {name: law_state[name] for name in _law_state.COUNTERS}
    names = _law_state.names_of(controller.law_state)
    new["law_state"] = _law_state.restored(names, law_state)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state.get(p, {}) for p in params]
    if not all(_state.has_moment(state, "exp_avg") for state in states):
        raise ValueError(
            "every parameter must have taken a step, got some without state; take one step with "
            "gradients for all of them before moving the run."
        )

    def moment(name: str, like: Any) -> Any:
        values = [_state.value_of(p, s, name) for p, s in zip(params, states, strict=True)]
        return _coded(like, tree([_array(value) for value in values]))

    changed = {"mu": moment("exp_avg", moments.mu)}
    if hasattr(moments, "nu"):
        changed["nu"] = moment("exp_avg_sq", moments.nu)
        changed["mu_decay"] = _common([s["beta1_product"] for s in states])
        changed["nu_decay"] = _common([s["beta2_product"] for s in states])
    count = law_state["step"]

    def replaced(node: Any) -> Any:
        kind = type(node).__name__
        if kind in _MOMENTS:
            return node._replace(**changed)
        if kind == "ScaleByMetaLearningRateState":
            applied = {n: law_state[n] for n in _law_state.APPLIED if n in law_state}
            return node._replace(count=count, **applied)
        if kind == "AverageIteratesState":
            means = [
                _state.average_of(p, s) if _state.has_average(s) else p
                for p, s in zip(params, states, strict=True)
            ]
            here = [tree([_array(value) for value in values]) for values in (means, params)]
            return node._replace(average=_coded(node.average, *here), count=count)
        if node is controller:
            return node._replace(inner_state=replaced(node.inner_state), **new)
        if isinstance(node, tuple):
            parts = [replaced(part) for part in node]
            return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)
        return node

    return replaced(opt_state)


def _parts(opt_state: Any) -> tuple[Any, Any]:
    """The one controller in a state, and the one set of moments under it."""
    controllers = _found(opt_state, ("StabilizeState",))
    moments = _found(opt_state, _MOMENTS)
    if len(controllers) != 1 or len(moments) != 1:
        raise ValueError(
            "opt_state must hold one controller with one set of moments, got "
            f"{len(controllers)} and {len(moments)}; pass the state of meta3(), meta_lion(), "
            "self_driving(), stability_v1() or stability_v2()."
        )
    return controllers[0], moments[0]


def _check_alike(optimizer: CruxyOptimizer, controller: Any, moments: Any) -> None:
    """Raises unless both sides have the same law and the same direction."""
    ours = optimizer._settings.law
    names = _law_state.leaves(_law_state.names_of(controller.law_state))
    if set(names) != set(_law_state.leaves(optimizer._settings.names)):
        raise ValueError(
            f"both sides must have the same law, got {type(controller.law_state).__name__} in "
            f"opt_state and {type(ours).__name__} in the optimizer; build both with the same mode."
        )
    theirs = Adam.moments if hasattr(moments, "nu") else Lion.moments
    for group in optimizer.param_groups:
        direction = optimizer._direction_of(group)
        if direction.moments != theirs:
            raise ValueError(
                f"both sides must have the same direction, got moments {theirs} in opt_state and "
                f"{direction.moments} of {type(direction).__name__} in the optimizer; build both "
                "as Adam or both as Lion."
            )


def _found(node: Any, kinds: tuple[str, ...]) -> list[Any]:
    here = [node] if type(node).__name__ in kinds else []
    below = node if isinstance(node, tuple) else ()
    return here + [found for part in below for found in _found(part, kinds)]


def _decoded(node: Any, how: str = "decode") -> Any:
    """The same nest with arrays where `cruxy_optax` has codes: what this method of them gives."""
    if hasattr(node, "codes"):
        return getattr(node, how)()
    if how == "spans" and hasattr(node, "dtype"):
        return np.zeros(np.shape(node), np.float32)
    return _mapped(lambda part: _decoded(part, how), node)


def _beside(param: torch.Tensor, average: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    """An average of which multiples of a span are known but for a parameter nearby; 0 for all."""
    near = param.detach().to(average.device, torch.float64)
    whole = torch.round((near - average) / torch.where(span > 0.0, span, math.inf))
    return (average + whole * span).to(average.dtype)


def _coded(like: Any, node: Any, beside: Any = None) -> Any:
    """The nest `node` in the dtypes of `like`, with codes where that has them, to the nearest.

    Args:
        like: the nest to be like.
        node: what is to be kept.
        beside: the nest of the parameters, where codes are read beside those.
    """
    if hasattr(like, "codes"):
        return like.encode(node, beside)
    if hasattr(like, "dtype"):
        array = np.asarray(node)
        if array.shape != tuple(like.shape):
            raise ValueError(
                f"tree() must give leaves of the shapes in opt_state, got {array.shape} for one of "
                f"{tuple(like.shape)}; transpose what the two frameworks lay out differently."
            )
        return array.astype(like.dtype)
    return _mapped(_coded, like, node, *([] if beside is None else [beside]))


def _mapped(function: Callable[..., Any], *nodes: Any) -> Any:
    """Applies a function below equal dictionaries, lists and tuples; else as the last one is."""
    first: Any = nodes[0]
    kind: Any = type(first)
    if isinstance(first, Mapping):
        return kind({k: function(*(node[k] for node in nodes)) for k in first})
    if isinstance(first, list | tuple):
        parts = [function(*row) for row in zip(*nodes, strict=True)]
        return kind(*parts) if hasattr(first, "_fields") else kind(parts)
    return nodes[-1]


def _at(column: Sequence[Any], index: int, count: int) -> Any:
    if len(column) != count:
        raise ValueError(
            f"leaves() must list one leaf for each of the optimizer's {count} parameters, got "
            f"{len(column)}; list them in the order of optimizer.param_groups."
        )
    return column[index]


def _tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.clone()
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":  # NumPy has no such type of its own
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def _array(value: torch.Tensor) -> np.ndarray:
    if value.dtype is torch.bfloat16:
        value = value.float()
    return value.detach().cpu().numpy().copy()


def _common(values: list[torch.Tensor]) -> np.ndarray:
    arrays = [value.cpu().numpy() for value in values]
    if any(array != arrays[0] for array in arrays):
        raise ValueError(
            "all parameters must have seen the same steps, got different bias corrections; an "
            "Optax state has one for all of them, so a run with parameters added later must stay."
        )
    return arrays[0]
