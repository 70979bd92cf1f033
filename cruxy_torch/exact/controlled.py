"""Meta3 on exact scalars, with exact signals and an exact update."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cruxy_control import Law, Meta3, Signals, betas, meta_learning_rate
from cruxy_control.signals import NOT_KNOWN
from cruxy_exact import optimizers as core
from cruxy_exact.arithmetic import f32, mul, settle
from cruxy_exact.scalars import Exact, Namespace, unwrapped, wrapped
from cruxy_torch.exact import _settings


class Controlled(Optimizer):
    """AdamW under a control law, every bit of which is the same everywhere.

    It senses the norms of the raw gradient by exact sums, runs the law on exact scalars, and steps
    with the clip, the rate and the decay rates that the law orders. A step whose gradient is not
    finite moves nothing.

    Args:
        params: parameters or groups of them; float32.
        lr: the learning rate that the law scales.
        betas: decays of the moments, which the law moves.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        law: `cruxy_control.Meta3()` unless given; one that measures no alignment.

    Raises:
        ValueError: where a number is out of its range, or the law measures the alignment of
            gradient and momentum, as `SelfDriving` does.
        TypeError: where a parameter is not float32.

    Examples:
        >>> import torch
        >>> from cruxy_torch import exact
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = exact.Controlled([p], lr=0.1)
        >>> p.grad = torch.full((2,), 0.5)
        >>> optimizer.step(loss=torch.tensor(3.0))
        tensor(3.)
        >>> p.data
        tensor([0.9243, 0.9243])
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        law: Law | None = None,
    ) -> None:
        law = Meta3() if law is None else law
        if getattr(law, "needs_alignment", False):
            raise ValueError(
                f"exact.Controlled measures no alignment of gradient and momentum, which {law!r} "
                "needs; use Meta3, StabilityV1 or StabilityV2."
            )
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"{name} must be at least 0, got {value!r}; use the default.")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas!r}; use (0.9, 0.999).")
        rest = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, rest)
        self.law = Exact(law)
        for p in self._params():
            if p.dtype != torch.float32:
                raise TypeError(
                    f"exact optimizers take float32 parameters, got {p.dtype}; convert the model "
                    "with .float()."
                )

    def _params(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, loss: Any = None) -> Any:
        """One step.

        Args:
            closure: computes the loss again, which is returned.
            loss: the loss of this step, which the law senses; float32 `()`, or a number. Give it
                alike everywhere: it is part of the bits.

        Returns:
            The loss.
        """
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [p for p in self._params() if p.grad is not None]
        if not moved:
            return loss
        device = moved[0].device
        xp = _settings.namespace(device)
        grads = {p: settle(p.grad, xp=xp) for p in moved}
        like = torch.zeros((), dtype=torch.float32, device=device)
        controls = self._controls(list(grads.values()), loss, like, xp)
        space = Namespace(xp, like)
        scalars = wrapped(controls, xp)
        for group in self.param_groups:
            rate = meta_learning_rate(scalars, f32(group["lr"]), xp=space) * scalars.phase_scale
            decays = betas(scalars, *map(f32, group["betas"]), xp=space)
            b1, b2, rate = unwrapped((*decays, rate))
            products = group.get("products", (like + 1.0, like + 1.0))
            group["products"] = products = core.next_products(products, (b1, b2), xp=xp)
            pairs = zip(core.adam_factors(*products, xp=xp), products, strict=True)
            # Before the first step that counts nothing is to be corrected, and 1 / 0 would be.
            factors = tuple(torch.where(w < 1.0, k, torch.ones_like(k)) for k, w in pairs)
            for p in group["params"]:
                if p.grad is not None:
                    g = mul(grads[p], controls.clip_scale, xp=xp)
                    g = torch.where(controls.ok, g, torch.zeros_like(g))
                    self._update(group, p, g, factors, rate, b1, b2, xp)
        return loss

    def _update(
        self, group: dict, p: Tensor, g: Tensor, factors: Any, rate: Any, b1: Any, b2: Any, xp: Any
    ) -> None:
        state = self.state[p]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        m, v = state["exp_avg"], state["exp_avg_sq"]
        options = {"eps": group["eps"], "weight_decay": group["weight_decay"]}
        out = core.adamw(p, g, m, v, factors, lr=rate, b1=b1, b2=b2, **options, xp=xp)
        for tensor, value in zip((p, m, v), out, strict=True):
            tensor.copy_(value)

    def _controls(self, grads: list[Tensor], loss: Any, like: Tensor, xp: Any) -> Any:
        """The orders of this step; the law's state is kept in the first group."""
        group, template = self.param_groups[0], self.law.init(like, xp=xp)
        state = _rebuilt(template, iter(group["law_state"])) if "law_state" in group else template
        signals = Signals(
            core.global_norm(grads, xp=xp),
            core.gamma_norm(grads, self.law.gamma, xp=xp),
            like + (NOT_KNOWN if loss is None else loss),
        )
        state, controls = self.law.step(state, signals, xp=xp)
        group["law_state"] = list(_leaves(state))
        return controls


def _leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, tuple):
        for part in tree:
            yield from _leaves(part)
    else:
        yield tree


def _rebuilt(template: Any, leaves: Iterator[Tensor]) -> Any:
    """A tree like `template` with these leaves."""
    if isinstance(template, tuple):
        return type(template)(*(_rebuilt(part, leaves) for part in template))
    return next(leaves).to(template.device)
