"""`Direction`: how a gradient becomes the direction of a step. What a user writes for one's own."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cruxy_torch._columns import Columns
from cruxy_torch._memory.state import has_moment
from cruxy_torch._orders import Orders

if TYPE_CHECKING:
    from cruxy_torch._actuators.stepped import SteppedTensor


class Direction:
    """How a gradient becomes a direction, and what is kept for it between steps.

    All else of an update is the same for every direction and is not written again: the norms and
    the guard, clipping, loss scaling, weight decay, the relative limit, low-bit state, rounding,
    averaging, gradient release, sharding, saving and telemetry.

    A subclass names its `moments` and writes `formula`; one that is not element by element writes
    `blocks`. An instance must not change and holds no tensors: what is to be remembered lies in the
    state of each parameter, so that it is saved with it. Instances are pickled with the optimizer.

    Attributes:
        moments: names of what is kept for each parameter in a tensor like it, zeros at first. A
            name that ends in `_sq` is of what is never negative. `state_bits` says in how many bits
            they are kept. The first is the momentum with which self-driving compares gradients.
        clocks: names of float32 numbers kept for each parameter, 1 at first, such as the product of
            all decay rates so far.
        is_finite: whether the direction is finite on a skipped step too, whose gradient is zero and
            whose moments may be; what is not costs another pass over the parameters.
        kind: `"adam"` where elements have size 1 or less and shrink, `"lion"` where they are signs,
            `"muon"` where matrices are made orthogonal: under self-driving the relative limit and
            the set point that go with it are taken (`cruxy_control.usual`).

    Examples:
        >>> import torch
        >>> import cruxy_torch
        >>> class Sign(cruxy_torch.Direction):
        ...     moments = ("exp_avg",)
        ...     def formula(self, x, moments, factors, orders):
        ...         average = orders.beta1 * moments["exp_avg"] + (1.0 - orders.beta1) * x
        ...         return average.sign(), {"exp_avg": average}
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = cruxy_torch.CruxyOptimizer(
        ...     [x], lr=0.01, direction=Sign(), weight_decay=0.0
        ... )
        >>> (x**2).sum().backward()
        >>> _ = optimizer.step(loss=5.0)
        >>> x.detach()
        tensor([ 0.9925, -1.9925])
    """

    moments: tuple[str, ...] = ()
    clocks: tuple[str, ...] = ()
    is_finite: bool = False
    kind: str = "adam"

    foreach: Any = None
    """`foreach(bucket, factors, orders)`, the same for many tensors at once by torch's foreach
    calls; `None` where there is none. See `Bucket`."""

    native: Any = None
    """`native(columns, orders, frame)`, the whole update in one pass over CPU tensors; `None`."""

    triton: Any = None
    """The same over CUDA tensors, which counts only where `native` is not `None`."""

    def pass_of(self, name: str) -> Any:
        """The whole update in one pass by a library, `"native"` or `"triton"`; `None` for none."""
        return None if self.native is None else getattr(self, name)

    def fused(self, tensor: "SteppedTensor", factors: Any, orders: Orders, rate: Tensor) -> bool:
        """A tensor's whole step by a library's kernels; whether it was done.

        Args:
            tensor: see `blocks`, as the next two.
            factors: likewise.
            orders: likewise.
            rate: of this tensor.
        """
        return False

    def start(self, state: dict[str, Any], param: Tensor, add: Callable[[str], None]) -> None:
        """Adds what is missing from a parameter's state.

        Args:
            state: of the parameter.
            param: the parameter.
            add: makes the moment of a name, in the bits and the dtype that the optimizer keeps.
        """
        for name in self.moments:
            if not has_moment(state, name):
                add(name)
        for name in self.clocks:
            if name not in state:
                state[name] = torch.ones((), dtype=torch.float32, device=param.device)

    def advance(self, columns: Columns, orders: Orders) -> Sequence[Any]:
        """What is decided once a step for each tensor; advances the clocks.

        Args:
            columns: the tensors, all on one device.
            orders: as 0-d tensors on that device. On a skipped step both decay rates are 1 and
                `ok` is false; nothing that is kept may move then.

        Returns:
            For each tensor what `blocks` gets as `factors`.
        """
        return [()] * len(columns.params)

    def blocks(
        self, tensor: "SteppedTensor", factors: Any, orders: Orders
    ) -> Callable[[int], Tensor]:
        """The direction of one tensor, block by block, in the dtype of its arithmetic.

        Args:
            tensor: the tensor with its gradient and its moments.
            factors: what `advance` gave for it.
            orders: see `advance`.

        Returns:
            A function that gives the direction of a block by its number, from 0 to
            `tensor.blocks - 1`; it is called once for each, in order.
        """

        def block(number: int) -> Tensor:
            moments = {name: tensor.read(name, number) for name in self.moments}
            direction, new = self.formula(tensor.gradient(number), moments, factors, orders)
            for name, value in new.items():
                tensor.write(name, number, value)
            return direction

        return block

    def formula(
        self, x: Tensor, moments: dict[str, Tensor], factors: Any, orders: Orders
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The direction of a block and its new moments, element by element.

        Args:
            x: the gradient, scaled and clipped; zero on a skipped step.
            moments: by name, before the step; they may be written to.
            factors: what `advance` gave for this tensor.
            orders: `beta1` and `beta2` are this step's decay rates, as 0-d tensors.

        Returns:
            The direction, whose size should be about 1, and the moments that changed.
        """
        raise TypeError(f"{type(self).__name__} must write formula() or blocks().")
