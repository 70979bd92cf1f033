"""What the loop knows of an optimizer: what it fixes for all groups, and what a group is."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cruxy_control import Law
from cruxy_control.formulas.limits import width_share
from cruxy_torch._kept import Kept
from cruxy_torch._native.fit import Passes
from cruxy_torch._orders import Orders


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an optimizer fixes for all its groups.

    Attributes:
        law: the control law.
        names: of the values in its state, see `_law_state.names_of`.
        lr_bounds: absolute bounds on each rate before the phase factor.
        max_grad_norm: the largest norm of what is left of a gradient, whatever the law allows;
            `None` for no such bound.
    """

    law: Law
    names: Any
    lr_bounds: tuple[float, float] | None
    max_grad_norm: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group(abc.ABC):
    """One parameter group's part in a step, as far as the loop knows it.

    Attributes:
        index: of the group.
        grads: the gradients there are, a `DTensor` where the parameter is one.
        lr: the user's learning rate.
        b1: the user's decay rate of the first moment; 0 for none.
        b2: the user's decay rate of the second moment; 0 for none.
        maximize: climbs instead of descending.
        averaging: power of the average of the parameters; `None` for none.
        relative_limit: no tensor's rate is above this share of its size, or of that of all tensors;
            less where it is wide; `None` for no limit.
        still: whether nothing of it moved in the step before, whose rate was 0.
        interpolation: see `averaging_orders`.
        limit_shares: by which the limit of each tensor falls with its width, see `width_share`;
            `None` where no limit does.
    """

    index: int
    grads: list[Tensor]
    lr: float | Tensor
    b1: float | Tensor
    b2: float | Tensor
    maximize: bool
    averaging: float | None
    relative_limit: float | None
    still: bool
    interpolation: float = 0.0
    limit_shares: Sequence[float] | None = None

    @property
    @abc.abstractmethod
    def rounds(self) -> bool:
        """Whether anything of it may be rounded by chance."""

    @abc.abstractmethod
    def momenta(self) -> Sequence[Kept]:
        """The first moment that belongs to each gradient, this rank's shards of them."""

    def averaged(self) -> Sequence[tuple[Kept, Kept]] | None:
        """This rank's part of the parameter of each gradient, with its average; `None` of none."""
        return None

    @abc.abstractmethod
    def limited(self) -> Sequence[Tensor]:
        """Every tensor that a relative limit bounds; none for no limit."""

    @abc.abstractmethod
    def update(self, orders: Orders, *, native: Passes | None, foreach: bool) -> None:
        """Updates parameters, state and averages in place.

        Args:
            orders: what the controller decided.
            native: a library that takes what it can take; `None` for none.
            foreach: takes torch's foreach calls for the rest.
        """


def limit_shares(params: Sequence[Tensor], width: int | None) -> list[float] | None:
    """By how much the relative limit of each falls with its width; `None` where none does.

    Args:
        params: whole, a `DTensor` where they are sharded.
        width: see `width_share`.
    """
    shares = [width_share(param.shape, width) for param in params]
    return shares if any(share < 1.0 for share in shares) else None
