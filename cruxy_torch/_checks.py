"""The checks at the door: what a user may give our optimizers."""

import functools
import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from cruxy_control.checks import check_bounds, check_range
from cruxy_torch._distributed.shards import placed_like
from cruxy_torch._native import library, triton_found

BITS = (32, 16, 8, 4)
"""Bits an element in which moments can be kept."""

AVERAGE_BITS = (32, 16, 8)
"""Bits an element in which averages can be kept."""

_OF_TORCH = {"amsgrad", "foreach", "fused", "differentiable"}
"""What groups of torch's own optimizers hold, and a group that was made of one of them."""


def check_lr_bounds(lr_bounds: tuple[float, float] | None) -> None:
    """Raises unless bounds on the rate are an ordered pair of numbers of at least 0."""
    if lr_bounds is not None:
        check_bounds("lr_bounds", lr_bounds, 0.0, math.inf, remedy="None is no bound")


def check_choices(
    momentum_dtype: torch.dtype | None,
    state_bits: int,
    select: Any,
    foreach: bool | None,
    fused: bool | None,
    compile: bool,
    differentiable: bool,
) -> None:
    """Raises where an argument for the whole optimizer is outside its range or excludes another."""
    if momentum_dtype is not None and not momentum_dtype.is_floating_point:
        raise ValueError(
            f"momentum_dtype must be a floating-point dtype, got {momentum_dtype}; "
            "torch.bfloat16 halves Lion's state."
        )
    if momentum_dtype is not None and state_bits != 32:
        raise ValueError(
            f"momentum_dtype must be None where state_bits says how moments are kept, got "
            f"{momentum_dtype} and state_bits={state_bits}; state_bits=16 is bfloat16 for both."
        )
    if select is not None and not callable(select):
        raise TypeError(
            f"select must be a function of a parameter, got {select!r}; give parameter groups a "
            "state_bits of their own where they are listed already."
        )
    if sum(bool(choice) for choice in (foreach, fused, compile)) > 1:
        raise ValueError(
            "at most one of foreach, fused and compile may be true, got "
            f"foreach={foreach}, fused={fused}, compile={compile}; leave all out for the default."
        )
    if fused and not (triton_found.available() or library.available()):
        raise RuntimeError(
            "fused=True needs a C compiler (cc, gcc or clang, or the variable CC), got none that "
            f"works, or Triton, but {triton_found.found().why!r}; leave fused out for the slower "
            "path."
        )
    if differentiable:
        raise ValueError(
            "differentiable must be False, got True; the controller decides from values, which "
            "has no useful derivative."
        )


def check_lr(lr: float | Tensor) -> None:
    """Raises where a learning rate is outside its range."""
    remedy = "1e-3 is the default"
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(
            f"a tensor lr must have one element, got shape {tuple(lr.shape)}; "
            "use torch.tensor(1e-3)."
        )
    check_range("lr", lr, 0.0, math.inf, upper_open=True, remedy=remedy)


def check_shared(group: dict[str, Any]) -> None:
    """Raises where an option that all our optimizers have is outside its range."""
    check_lr(group["lr"])
    remedy = "0 switches it off"
    check_range(
        "weight_decay", group["weight_decay"], 0.0, math.inf, upper_open=True, remedy=remedy
    )
    limit = group["relative_limit"]
    if limit is not None:
        remedy = "0.1 is usual for Adam, 0.01 for Lion, and None is no limit"
        check_range("relative_limit", limit, 0.0, lower_open=True, remedy=remedy)
    if group["averaging"] is not None:
        remedy = "16 is usual, and None keeps no average"
        check_range("averaging", group["averaging"], 0.0, remedy=remedy)
    check_bits("average_bits", group["average_bits"], AVERAGE_BITS)
    remedy = "use 0 for an average that pulls nothing"
    pull = group.get("interpolation", 0.0)
    check_range("interpolation", pull, 0.0, 1.0, upper_open=True, remedy=remedy)


def check_group(group: dict[str, Any]) -> None:
    """Raises where an option of a parameter group, defaults filled in, is outside its range."""
    check_shared(group)
    pair = group["betas"]
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(f"betas must be a pair, got {pair!r}; (0.9, 0.999) is the default.")
    for index, beta in enumerate(pair):
        remedy = "(0.9, 0.999) is the default"
        check_range(f"betas[{index}]", beta, 0.0, 1.0, upper_open=True, remedy=remedy)
    remedy = "1e-8 is the default"
    check_range("eps", group["eps"], 0.0, math.inf, upper_open=True, remedy=remedy)
    check_bits("state_bits", group["state_bits"])


def check_options(cls: type, defaults: dict[str, Any], group: dict[str, Any]) -> None:
    """Raises where a group says for itself what holds for the whole optimizer; it is never read.

    Keys that are no argument of the optimizer are the user's own, and pass.

    Args:
        cls: of the optimizer.
        defaults: its options of a group. The direction is among them, to be saved with the state,
            and yet is no group's own.
        group: as it was given.
    """
    for name in group.keys() & _arguments(cls):
        own = name in defaults and (name != "direction" or group[name] == defaults[name])
        if not own and name not in _OF_TORCH:
            raise ValueError(
                f"{name} must be given to {cls.__name__}, for all groups alike, got a parameter "
                f"group with {name}={group[name]!r}; leave it out of the group."
            )


@functools.cache
def _arguments(cls: type) -> frozenset[str]:
    """What the optimizer and those of ours that it derives from take besides parameters."""
    ours = (c for c in cls.__mro__ if c.__module__.startswith("cruxy_torch."))
    own = (vars(c)["__init__"] for c in ours if "__init__" in vars(c))
    names = (name for function in own for name in inspect.signature(function).parameters)
    return frozenset(names) - {"self", "params"}


def check_bits(name: str, bits: Any, among: Sequence[int] = BITS) -> None:
    """Raises unless the number of bits is one of those."""
    if bits not in among:
        *first, last = sorted(among)
        raise ValueError(
            f"{name} must be {', '.join(map(str, first))} or {last}, got {bits!r}; 8 loses next to "
            "nothing."
        )


def one_loss(first: Any, second: Any) -> Any:
    """The loss that came in the place of a closure; raises where there is another."""
    if second is not None:
        raise TypeError(
            f"closure must be callable, got {first!r} and loss={second!r}; give one loss."
        )
    return first


def listed(group: dict[str, Any]) -> dict[str, Any]:
    """A copy of a group with its parameters in a list: a generator can be read only once."""
    params = group.get("params", [])
    return {**group, "params": [params] if isinstance(params, Tensor) else list(params)}


def called(group: dict[str, Any], index: int) -> list[str]:
    """What each parameter of a group is called: its name, or its place and its shape."""
    names = group.get("param_names", ())
    if len(names) == len(group["params"]):  # else what was added or taken away moved them
        return list(names)
    return [
        f"group {index}, parameter {place} (shape {tuple(param.shape)})"
        for place, param in enumerate(group["params"])
    ]


def check_params(params: Iterable[Any]) -> None:
    """Raises unless what is trained is real and floating-point; frozen ones may be anything."""
    for entry in params:
        param = entry[1] if isinstance(entry, tuple) else entry  # named parameters come in pairs
        if isinstance(param, Tensor) and param.requires_grad and not param.is_floating_point():
            raise ValueError(
                f"parameters must be real floating-point tensors, got {param.dtype}; "
                "optimize torch.view_as_real(p) in place of a complex p."
            )


def dense_grad(param: Tensor) -> Tensor:
    """The gradient of a parameter that has one, reduced and placed as the parameter is.

    Raises:
        ValueError: where the parameter is complex.
        RuntimeError: where the gradient is sparse.
    """
    grad: Any = param.grad
    if type(grad) is Tensor and grad.is_floating_point() and grad.layout is torch.strided:
        # A view that is to be negated when it is read would reach a pointer with the wrong sign.
        return grad.resolve_neg() if grad.is_neg() else grad
    check_params([param])
    grad = placed_like(cast(Tensor, param.grad), param)
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"gradients must be dense, got layout {grad.layout}; "
            "build the embedding with sparse=False."
        )
    return grad
