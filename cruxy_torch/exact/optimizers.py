"""Exact optimizers of `torch.optim`'s kind, and the clip."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.optim import Optimizer

from cruxy_exact import optimizers as core
from cruxy_exact.arithmetic import mul, settle
from cruxy_torch._loading import check_form
from cruxy_torch.exact import _settings


class ExactOptimizer(Optimizer):
    """What exact optimizers share: checks of their groups, and of what they load."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as in `torch.optim`; those of `__init__` come here too.

        Raises:
            ValueError: where an option is out of its range; no group is added then.
            TypeError: where a parameter is not float32; likewise.
        """
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave.

        Args:
            state_dict: of an optimizer of this class with the same groups and law.

        Raises:
            ValueError: where it is another optimizer's or law's, or of parameters of other shapes.
                The optimizer is then as it was.
        """
        check_form(state_dict)
        groups = state_dict["param_groups"]
        for group in groups:
            self._check_options(group)
        saved = [(group, i) for group in groups for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        if len(saved) == len(params):  # else torch says so
            for p, (group, i) in zip(params, saved, strict=True):
                self._check_kept(p, group, state_dict["state"].get(i, {}))
        super().load_state_dict(state_dict)

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay", "momentum"):
            value = group.get(name, 0.0)
            if not isinstance(value, Tensor) and not value >= 0.0:
                raise ValueError(f"{name} must be at least 0, got {value!r}; use the default.")
        if not all(0.0 <= beta < 1.0 for beta in group.get("betas", ())):
            raise ValueError(f"betas must be in [0, 1), got {group['betas']!r}; use (0.9, 0.999).")
        for p in group["params"]:
            if p.dtype != torch.float32:
                raise TypeError(
                    f"exact optimizers take float32 parameters, got {p.dtype}; convert the model "
                    "with .float()."
                )

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raises unless a saved group has the options of this class."""
        missing = sorted(self.defaults.keys() - group.keys())
        if missing:
            raise ValueError(
                f"the state must be one of {type(self).__name__}, got one whose groups lack "
                f"{missing}; load it into the class that saved it."
            )

    def _check_kept(self, p: Tensor, group: dict[str, Any], kept: dict[str, Any]) -> None:
        """Raises unless what was saved of a parameter is what this class keeps of it."""
        expected = set(self._names(group))
        if kept and set(kept) != expected:
            raise ValueError(
                f"the state must be one of {type(self).__name__}, which keeps {sorted(expected)} "
                f"of a parameter, got {sorted(kept)}; load it into an optimizer of the class and "
                "options that saved it."
            )
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.shape != p.shape:
                raise ValueError(
                    f"{name} must have shape {tuple(p.shape)} like its parameter, got "
                    f"{tuple(value.shape)}; load it into the model that it was saved with."
                )

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """What is kept of each parameter of a group."""
        raise TypeError(f"{type(self).__name__} must say what it keeps of a parameter.")


class _Optimizer(ExactOptimizer):
    """The frame of a step that takes each parameter by itself."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure`, where given, computes the loss again, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.is_sparse:
                        raise TypeError("exact optimizers take dense gradients, got a sparse one.")
                    xp = _settings.namespace(p.device)
                    self._update(group, p, settle(p.grad, xp=xp), self.state[p], xp)
        return loss

    def _update(self, group: dict, p: Tensor, g: Tensor, state: dict, xp: Any) -> None:
        raise TypeError(f"{type(self).__name__} must say how it updates a parameter.")


class AdamW(_Optimizer):
    """AdamW with the same bits everywhere. Arguments as of `torch.optim.AdamW`.

    Args:
        params: parameters or groups of them; float32.
        lr: the learning rate; a number, or a float32 tensor `()`.
        betas: decays of the moments.
        eps: added to the root of the second.
        weight_decay: decoupled.

    Raises:
        ValueError: where a number is out of its range.
        TypeError: where a parameter is not float32.

    Examples:
        >>> import torch
        >>> from cruxy_torch import exact
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> p.grad = torch.full((2,), 0.5)
        >>> exact.AdamW([p], lr=0.1).step()
        >>> p.data
        tensor([0.8990, 0.8990])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "products")

    def _update(self, group: dict, p: Tensor, g: Tensor, state: dict, xp: Any) -> None:
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["products"] = (1.0, 1.0)
        # On the host, where these are two of a handful of numbers: the same float32 operations.
        products = core.next_products(
            [numpy.float32(x) for x in state["products"]], group["betas"], xp=numpy
        )
        state["products"] = tuple(float(x) for x in products)
        factor1, factor2 = core.adam_factors(*products, xp=numpy)
        factors = float(factor1), float(factor2)
        b1, b2 = group["betas"]
        options = {name: group[name] for name in ("lr", "eps", "weight_decay")}
        m, v = state["exp_avg"], state["exp_avg_sq"]
        native = getattr(xp, "adamw_", None)
        if native is None or not native(p, m, v, g, factors, b1=b1, b2=b2, **options):
            out = core.adamw(p, g, m, v, factors, b1=b1, b2=b2, **options, xp=xp)
            _write(out, (p, m, v))


class Lion(_Optimizer):
    """Lion ([arXiv 2302.06675](https://arxiv.org/abs/2302.06675)) with the same bits everywhere.

    Args:
        params: parameters or groups of them; float32.
        lr: the learning rate; a number, or a float32 tensor `()`.
        betas: of the direction, and of the moment that is kept.
        weight_decay: decoupled.

    Raises:
        ValueError: where a number is out of its range.
        TypeError: where a parameter is not float32.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    def _update(self, group: dict, p: Tensor, g: Tensor, state: dict, xp: Any) -> None:
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
        b1, b2 = group["betas"]
        options = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        out = core.lion(p, g, state["exp_avg"], b1=b1, b2=b2, **options, xp=xp)
        _write(out, (p, state["exp_avg"]))


class SGD(_Optimizer):
    """SGD with the same bits everywhere. Arguments as of `torch.optim.SGD`.

    Args:
        params: parameters or groups of them; float32.
        lr: the learning rate; a number, or a float32 tensor `()`.
        momentum: its decay; 0 for none.
        weight_decay: times the parameter is added to the gradient.
        nesterov: looks one step of the momentum ahead.

    Raises:
        ValueError: where a number is out of its range, or `nesterov` has no momentum.
        TypeError: where a parameter is not float32.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        if nesterov and not momentum:
            raise ValueError("nesterov needs a momentum above 0, got 0; use momentum=0.9.")
        rest = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, lr=lr, **rest)

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _update(self, group: dict, p: Tensor, g: Tensor, state: dict, xp: Any) -> None:
        if group["momentum"] and not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        names = ("lr", "momentum", "nesterov", "weight_decay")
        m = state.get("momentum_buffer")
        out = core.sgd(p, g, m, **{name: group[name] for name in names}, xp=xp)
        _write(out, (p, m))


def _write(values: Iterable[Any], tensors: Iterable[Any]) -> None:
    for value, tensor in zip(values, tensors, strict=True):
        if tensor is not None and value is not tensor:
            tensor.copy_(value)


@torch.no_grad()
def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales gradients so that their norm together is at most `max_norm`; exactly.

    Args:
        parameters: whose gradients are clipped in place.
        max_norm: the largest norm, above 0.

    Returns:
        The norm before, float32 `()`. Where it is NaN all gradients become NaN.

    Raises:
        ValueError: where `max_norm` is not above 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, got {max_norm!r}; use 1.")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(
            (), dtype=torch.float32, device="cpu"
        )  # as torch.nn.utils.clip_grad_norm_ does
    xp = _settings.namespace(grads[0].device)
    for g in grads:
        g.copy_(settle(g, xp=xp))
    norm = core.global_norm(grads, xp=xp)
    factor = core.clip_factor(norm, max_norm, xp=xp)
    for g in grads:
        g.copy_(mul(g, factor.to(g.device), xp=xp))
    return norm
