"""`AXIOM_DDP`: the largest entries of a gradient, with where they are."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cruxy_control.checks import check_count, check_range
from cruxy_torch._distributed.messages import gathered


class TopK(NamedTuple):
    """The largest entries of a gradient, a payload of `AXIOM_DDP`.

    Attributes:
        values: float32, `(count,)`.
        indices: where they are in the flattened gradient; int32, `(count,)`, ascending.
        count: how many there are.
    """

    values: Tensor
    indices: Tensor
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes of values and indices: 8 for each entry that is kept."""
        return sum(part.numel() * part.element_size() for part in (self.values, self.indices))


class AXIOM_DDP:  # noqa: N801
    """Gradients cut down to their largest entries, under the names of `quarterbit`.

    Of `n` elements the largest `top_k_percent` are kept as float32 with int32 positions: 8 bytes
    each, an eighth of float32 at 6.25 %, where `nbytes` counts them. What is left behind is added
    to the next gradient, since it would otherwise never arrive.

    Positions of different ranks differ, so that payloads must not be added up: an all-reduce of
    `indices` gives positions that nobody meant. `mean` gathers them, which costs 8 bytes an entry
    and rank. `CompressedAllReduce` sends every entry in 8 or 4 bits, loses none, and keeps nothing
    back; prefer it.

    Args:
        n: elements of a gradient, at least 1 and below 2^31.
        top_k_percent: what is kept, above 0, at most 100.
        feedback: adds what was left behind to the next gradient: a buffer of 4 bytes an element.

    Raises:
        ValueError: where an argument is outside its range.

    Examples:
        >>> import torch, cruxy_torch
        >>> wire = cruxy_torch.AXIOM_DDP(n=16, top_k_percent=6.25)
        >>> gradient = torch.zeros(16).index_fill(0, torch.tensor(3), 2.0)
        >>> payload = wire.compress(gradient)
        >>> payload.nbytes, payload.indices
        (8, tensor([3], dtype=torch.int32))
        >>> torch.equal(wire.decompress(payload), gradient)
        True

    References:
        Stich et al., [Sparsified SGD with Memory](https://arxiv.org/abs/1809.07599), 2018.
    """

    def __init__(self, n: int, top_k_percent: float = 6.25, *, feedback: bool = True) -> None:
        self._n = check_count("n", n, 1, remedy="give the elements of all gradients together")
        if n >= 2**31:
            raise ValueError(f"n must be below 2^31, got {n}; take an AXIOM_DDP for each part.")
        remedy = "6.25 keeps a sixteenth"
        percent = check_range(
            "top_k_percent", top_k_percent, 0.0, 100.0, lower_open=True, remedy=remedy
        )
        self._count = max(1, math.floor(n * percent / 100.0))
        self._rest: Tensor | None = None
        self._feedback = feedback

    @torch.no_grad()
    def compress(self, gradients: Tensor) -> TopK:
        """The largest entries of a gradient and of what the last one left behind.

        Args:
            gradients: `n` elements of any floating dtype and shape.

        Returns:
            A payload, which is also the tuple `values, indices, count`.

        Raises:
            ValueError: where it has another number of elements.
        """
        if gradients.numel() != self._n:
            raise ValueError(
                f"gradients must have n = {self._n} elements, got {gradients.numel()}; flatten and "
                "join those of all parameters."
            )
        whole = gradients.detach().reshape(-1).to(torch.float32)
        if self._rest is not None:
            whole = whole + self._rest.to(whole.device)
        indices = torch.topk(whole.abs(), self._count, sorted=False).indices.sort().values
        values = whole[indices]
        if self._feedback:
            self._rest = whole.index_fill(0, indices, 0.0)
        return TopK(values, indices.to(torch.int32), self._count)

    def decompress(
        self,
        payload: "TopK | Sequence[TopK] | Tensor",
        indices: Tensor | None = None,
        count: int | None = None,
    ) -> Tensor:
        """The gradient that payloads stand for, zero where nobody sent anything.

        Args:
            payload: one; or those of all ranks, of which the mean is taken; or the values of one,
                with `indices` and `count`.
            indices: of one payload.
            count: of one payload.

        Returns:
            float32, `(n,)`.

        Raises:
            ValueError: where positions are not those of one gradient, as after they were added up
                over ranks.
        """
        if isinstance(payload, Tensor):
            if indices is None:
                raise ValueError(
                    "values need their indices, got values alone; give decompress(values, indices, "
                    "count) or the payload."
                )
            payload = TopK(payload, indices, self._count if count is None else count)
        payloads = [payload] if isinstance(payload, TopK) else list(payload)
        whole = payloads[0].values.new_zeros(self._n, dtype=torch.float32)
        for one in payloads:
            whole.index_add_(0, self._positions(one), one.values[: one.count].to(torch.float32))
        return whole / len(payloads)

    def mean(self, payload: TopK, process_group: dist.ProcessGroup | None = None) -> Tensor:
        """The mean over ranks of what they kept: payloads are gathered, and never added up.

        Args:
            payload: of this rank; all ranks have the same `n` and `top_k_percent`.
            process_group: of the ranks; `None` for all processes.

        Returns:
            float32, `(n,)`, the same on all ranks, to the bit.
        """
        values, _ = gathered(payload.values, process_group)
        indices, _ = gathered(payload.indices, process_group)
        return self.decompress(
            [TopK(v, i, payload.count) for v, i in zip(values, indices, strict=True)]
        )

    def state_dict(self) -> dict[str, Any]:
        """What the last gradient left behind, which is this rank's own."""
        return {"rest": self._rest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self._rest = state_dict["rest"]

    def _positions(self, payload: TopK) -> Tensor:
        indices = payload.indices[: payload.count]
        in_order = (
            (indices[1:] > indices[:-1]).all() & (indices >= 0).all() & (indices < self._n).all()
        )
        if not bool(in_order):
            raise ValueError(
                f"indices must ascend from 0 to below n = {self._n}, got others: those of several "
                "ranks must not be added up; use mean(payload), or give decompress() the payloads "
                "of all ranks."
            )
        return indices.to(torch.int64)
