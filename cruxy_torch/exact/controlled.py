"""AdamW under a control law on exact scalars, with exact signals and an exact update."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from cruxy_control import Law, Meta3, driving
from cruxy_control.checks import check_range
from cruxy_control.law import check_excess, check_law, needs_alignment
from cruxy_control.usual import USUAL, told_the_end, usual_law
from cruxy_exact.arithmetic import settle
from cruxy_exact.driven import Driven, Group, Leaf
from cruxy_torch._averaged import averaged_block
from cruxy_torch._sensors.loss import scalar_loss
from cruxy_torch.exact import _settings
from cruxy_torch.exact.optimizers import ExactOptimizer


class Controlled(ExactOptimizer):
    """AdamW under a control law, every bit of which is the same everywhere.

    It senses the raw gradient by exact sums, runs the law on exact scalars, and steps with the
    clip, the rate and the decay rates that the law orders. A step whose gradient is not finite
    moves nothing.

    Args:
        params: parameters or groups of them; float32.
        lr: the learning rate that the law scales; above 0 under a law that finds the rate.
        betas: decays of the moments, which the law moves.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        law: `cruxy_control.Meta3()` unless given.
        nesterov: looks one step ahead.
        relative_limit: no tensor gets a rate above this share of its own root mean square, or of
            that of all parameters where that is smaller; above 0, `None` for no limit. Of tensors
            wider than 64 it falls with the root of their width.
        averaging: the power of the average of the iterates, at least 0; `None` keeps none. See
            `averaged`.

    Raises:
        ValueError: where a number is out of its range.
        TypeError: where a parameter is not float32, or `law` is none.

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
        *,
        nesterov: bool = False,
        relative_limit: float | None = None,
        averaging: float | None = None,
    ) -> None:
        law = Meta3() if law is None else law
        check_law(law)
        check_excess(law, remedy="leave it out")
        if relative_limit is not None:
            remedy = "use 0.1, or None for no limit"
            check_range("relative_limit", relative_limit, 0.0, lower_open=True, remedy=remedy)
        if averaging is not None:
            check_range("averaging", averaging, 0.0, remedy="use 16, or None for no average")
        self._driven = Driven(law, driving, nesterov, relative_limit, averaging)
        self._averaged = False
        self._held: list[Tensor] | None = None  # the law's state, should its group be taken out
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def __getstate__(self) -> dict[str, Any]:
        # A module, which `rules` is, has no copy.
        driven = dataclasses.replace(self._driven, rules=None)
        return super().__getstate__() | {"_driven": driven, "_averaged": self._averaged}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._driven = dataclasses.replace(self._driven, rules=driving)
        self._held = self.param_groups[0].get("law_state") if self.param_groups else None

    @property
    def law(self) -> Law:
        """The control law."""
        return self._driven.law

    def _params(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        lr = group["lr"]
        if needs_alignment(self.law) and not isinstance(lr, Tensor) and not lr:
            raise ValueError(
                f"lr must be above 0 under a law that finds the rate, got {lr!r}; it multiplies "
                "what it is given: use the default."
            )

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        if "law_state" not in group:
            return
        like = torch.zeros((), dtype=torch.float32, device="cpu")
        template = self._driven.init(like, xp=_settings.namespace(like.device))
        shapes = [tuple(leaf.shape) for leaf in _leaves(template)]
        saved = [tuple(leaf.shape) for leaf in group["law_state"]]
        if saved != shapes:
            raise ValueError(
                f"the state must be one of the law {type(self.law).__name__}, which keeps "
                f"{len(shapes)} numbers, got {len(saved)} of other shapes; load it into an "
                "optimizer of the law that saved it."
            )

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        average = () if self._driven.averaging is None else ("average",)
        return ("exp_avg", "exp_avg_sq", *average)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, loss: Any = None) -> Any:
        """One step.

        Args:
            closure: computes the loss again, which is returned.
            loss: the loss of this step, which the law senses; float32 `()`, or a number. Give it
                alike everywhere: it is part of the bits. Of micro-batches and processes it is what
                `GrainAccumulator.finish` returns.

        Returns:
            The loss.

        Raises:
            RuntimeError: inside `averaged`.
            ValueError: where the loss is not one real number.
            TypeError: where a gradient is sparse.
        """
        if self._averaged:
            raise RuntimeError("step() must not run inside averaged(); leave the block first.")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = None if loss is None else scalar_loss(loss)
        moved = [
            (number, p)
            for number, group in enumerate(self.param_groups)
            for p in group["params"]
            if p.grad is not None
        ]
        if any(p.grad.is_sparse for _, p in moved):
            raise TypeError("exact optimizers take dense gradients, got a sparse one.")
        if not any(p.numel() for _, p in moved):
            return loss
        device = moved[0][1].device
        xp = _settings.namespace(device)
        like = torch.zeros((), dtype=torch.float32, device=device)
        leaves = [self._leaf(p, number, xp) for number, p in moved]
        groups = [
            Group(
                learning_rate=group["lr"],
                b1=group["betas"][0],
                b2=group["betas"][1],
                eps=group["eps"],
                products=group.get("products", (like + 1.0, like + 1.0)),
            )
            for group in self.param_groups
        ]
        sensed = None if given is None else like + given
        kept = self._kept(like, xp)
        state, products, out = self._driven.step(kept, groups, leaves, sensed, xp=xp)
        self._held = self.param_groups[0]["law_state"] = list(_leaves(state))
        for group, pair in zip(self.param_groups, products, strict=True):
            group["products"] = pair
        for (_, p), new in zip(moved, out, strict=True):
            kept = self.state[p]
            kept["exp_avg"].copy_(new.m)
            kept["exp_avg_sq"].copy_(new.v)
            if new.average is not None:
                kept["average"].copy_(new.average)
            p.copy_(settle(settle(p, xp=xp) - new.change, xp=xp))
        return loss

    def _leaf(self, p: Tensor, number: int, xp: Any) -> Leaf:
        state = self.state[p]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            if self._driven.averaging is not None:
                state["average"] = p.detach().clone()
        decay = self.param_groups[number]["weight_decay"]
        kept = state["exp_avg"], state["exp_avg_sq"], state.get("average")
        return Leaf(p, settle(p.grad, xp=xp), *kept, decay, number)

    def _kept(self, like: Tensor, xp: Any) -> Any:
        """What the law and the limit remember; it is kept in the first group."""
        template = self._driven.init(like, xp=xp)
        leaves = self.param_groups[0].get("law_state", self._held)
        return template if leaves is None else _rebuilt(template, iter(leaves))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the parameters are their averages over the run, for evaluating, saving.

        Raises:
            ValueError: where no average is kept.
            RuntimeError: where blocks are nested; from `step` inside.
        """
        if self._driven.averaging is None:
            raise ValueError("averaged() needs averages, got averaging=None; use averaging=16.")
        with averaged_block(self):
            yield


class SelfDriving(Controlled):
    """AdamW without a learning rate, a warm-up or a schedule, exactly.

    `Controlled` with what is usual for `cruxy_control.SelfDriving`: the rate follows how gradient
    and momentum agree, the relative limit bounds what a step moves, and `averaged` has the average
    of the iterates, which is what to evaluate and keep.

    Args:
        params: parameters or groups of them; float32.
        lr: where the search starts; above 0. Leave it out.
        betas: decays of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        law: `cruxy_control.SelfDriving()` unless given.
        total_steps: of the run, where they are known: the rate then falls to 0 at the end.
        nesterov: looks one step ahead.
        relative_limit: see `Controlled`; 0.1.
        averaging: see `Controlled`.

    Raises:
        ValueError: where a number is out of its range, or `total_steps` meets a law that finds no
            rate.
        TypeError: where a parameter is not float32, or `law` is none.

    Examples:
        >>> import torch
        >>> from cruxy_torch import exact
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = exact.SelfDriving([x])
        >>> for _ in range(100):
        ...     x.grad = 2.0 * (x.detach() - 5.0)
        ...     _ = optimizer.step()
        >>> with optimizer.averaged():
        ...     print(x.detach().round(decimals=1))
        tensor([5., 5.])
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-4,
        law: Law | None = None,
        *,
        total_steps: int | None = None,
        nesterov: bool = True,
        relative_limit: float | Literal["usual"] | None = "usual",
        averaging: float | None = 16.0,
    ) -> None:
        law = usual_law("adam", ends=total_steps is not None) if law is None else law
        law = told_the_end(law, total_steps)
        limit = USUAL["adam"].relative_limit if isinstance(relative_limit, str) else relative_limit
        options = {"nesterov": nesterov, "relative_limit": limit, "averaging": averaging}
        super().__init__(params, lr, betas, eps, weight_decay, law, **options)


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
