"""Sums over many tensors of any forms by Triton: what is measured of gradients and parameters."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cruxy_torch._kept import Kept, raw
from cruxy_torch._native import fit, triton_launch, triton_steps
from cruxy_torch._native.triton_kernels import ROWS
from cruxy_torch._native.triton_launch import NOTHING, OPTIONS, Form
from cruxy_torch._native.triton_rules import parts
from cruxy_torch._native.triton_tables import Table, constant, table

_POWERS = {1.5: 0, 2.0: 1}


class Together:
    """The sums over gradients of any forms, and the sizes of their parameters in the same pass.

    Attributes:
        squares: the mean square of each parameter, float32; only where `complete`, as the next.
        whole: the sum of the squares of all parameters, float32, 0-d.
        elements: of all parameters.
    """

    def __init__(self, grads: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        self._numbers = {id(grad): i for i, grad in enumerate(grads)}
        self._params, self._measured = params, 0
        self.elements = sum(map(Tensor.numel, params))
        self.whole: Any = None
        self.squares: Any = None
        if params:
            device = params[0].device
            self.squares = torch.empty(len(params), dtype=torch.float32, device=device)

    @property
    def complete(self) -> bool:
        """Whether every parameter was measured."""
        return 0 < len(self._params) == self._measured

    def split(self, lengths: Sequence[int]) -> list[tuple[Tensor, list[int]]]:
        """Mean squares and elements of the first so many, of the next so many, and so on."""
        found, begin = [], 0
        for length in lengths:
            own = slice(begin, begin + length)
            found.append((self.squares[own], list(map(Tensor.numel, self._params[own]))))
            begin += length
        return found

    def sums(
        self,
        grads: list[Tensor],
        gamma: float,
        scale: Tensor,
        momenta: Sequence[tuple[Kept, float]] | None,
    ) -> tuple[Tensor | None, list[int]]:
        """What `_sensors.measure.sums` says of what Triton takes, and the numbers of the rest.

        Raises:
            SetAsideError: where a kernel fails.
        """
        moments = [] if momenta is None else [[kept for kept, _ in momenta]]
        places = [self._numbers.get(id(grad), -1) for grad in grads]
        params: list[Tensor] | None = None
        fast, slow = parts([grads], moments)
        if self._params and grads and min(places) >= 0:
            params = [self._params[place] for place in places]
            together, apart = parts([grads, params], moments)
            if apart:
                params = None
            else:
                fast = together
        devices = dict.fromkeys(grads[part[0]].device for part in fast)
        if params is not None and devices.keys() != {self.squares.device}:
            params = None
        totals = [
            self._on_one(
                [part for part in fast if grads[part[0]].device == device],
                grads, gamma, scale, momenta, params, places,
            )
            for device in devices
        ]  # fmt: skip
        if not totals:
            return None, slow
        return totals[0] if len(totals) == 1 else torch.stack(totals).sum(0), slow

    def _on_one(
        self,
        fast: Sequence[Sequence[int]],
        grads: list[Tensor],
        gamma: float,
        scale: Tensor,
        momenta: Sequence[tuple[Kept, float]] | None,
        params: Sequence[Tensor] | None,
        places: Sequence[int],
    ) -> Tensor:
        """The sums over what lies on one device."""
        counts = [max(1, param.numel()) for param in params or ()]
        of, partial = _sums_of_chunks(
            grads, gamma, scale, momenta, params, counts, parts_of=fast, places=places
        )
        out = torch.empty(5, dtype=torch.float32, device=partial.device)
        triton_launch.launch(
            partial.device, triton_steps.sums_of_all, (5 + (of.tensors if params else 0),),
            partial, of.count, of.chunks, of.starts, of.values, of.tensors, out,
            self.squares if params else out, WIDTH=1024, **OPTIONS,
        )  # fmt: skip
        if params:
            self._measured += len(params)
            self.whole = out[4] if self.whole is None else self.whole + out[4]
        return out[: 2 if momenta is None else 4].to(scale.device, non_blocking=True)


def sums(
    grads: list[Tensor],
    gamma: float,
    scale: Tensor,
    momenta: Sequence[tuple[Kept, float]] | None = None,
) -> Tensor:
    """What `_sensors.measure.sums` says, of tensors of one of the `parts`, in one pass."""
    total, _ = Together((), ()).sums(grads, gamma, scale, momenta)
    return torch.zeros(2, dtype=torch.float32, device=scale.device) if total is None else total


def sums_by_tensor(
    grads: Sequence[Tensor],
    gamma: float,
    scale: Tensor,
    momenta: Sequence[tuple[Kept, float]] | None = None,
    params: Sequence[Tensor] | None = None,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """Of each tensor `sum g^2`, `sum |g|^gamma`, `sum g m`, `sum m^2` and `sum p^2`, in one pass.

    Args:
        grads: tensors of one of the `parts`; empty for none.
        gamma: the exponent.
        scale: factor on every gradient; 0-d.
        momenta: the first moments with their signs, see `_sensors.measure.products`.
        params: the parameters.
        counts: what each `sum p^2` is divided by; 1 where it is left out.

    Returns:
        float32, `(5, tensors)`; 0 of what was not given.
    """
    of, partial = _sums_of_chunks(grads, gamma, scale, momenta, params, counts)
    out = torch.empty((5, of.tensors), dtype=torch.float32, device=partial.device)
    triton_launch.launch(
        partial.device, triton_steps.sums_of_tensors, (of.tensors, 5),
        partial, of.count, of.starts, of.values, of.tensors, out, WIDTH=256, **OPTIONS,
    )  # fmt: skip
    return out


def mean_squares(tensors: list[Tensor], counts: list[int]) -> Tensor:
    """The sum of the squares of each tensor over a count; float32, a vector."""
    device = tensors[0].device
    return sums_by_tensor((), 2.0, constant(1.0, device), params=tensors, counts=counts)[4]


def _sums_of_chunks(
    grads: Sequence[Tensor],
    gamma: float,
    scale: Tensor,
    momenta: Sequence[tuple[Kept, float]] | None = None,
    params: Sequence[Tensor] | None = None,
    counts: Sequence[int] | None = None,
    parts_of: Sequence[Sequence[int]] | None = None,
    places: Sequence[int] | None = None,
) -> tuple[Table, Tensor]:
    """The table of all tensors, part by part, and the sums over their chunks, a launch a part."""
    tensors = [*(grads or params or ())]
    parts_of = parts_of or [range(len(tensors))]
    order = [i for part in parts_of for i in part]

    def ordered(column: Sequence[Any]) -> list[Any]:
        return [column[i] for i in order]

    columns: dict[str, Sequence[int]] = {"numel": list(map(Tensor.numel, ordered(tensors)))}
    columns["count"] = ordered(counts) if counts else [1] * len(order)
    if grads:
        columns["grad"] = fit.addresses(ordered(grads))
    if momenta is not None:
        kept = [momenta[i][0] for i in order]
        columns["first"] = fit.addresses(list(map(raw, kept)))
        columns["first_scales"] = fit.scales(kept)
        columns["sign"] = [int(momenta[i][1]) for i in order]
    if params:
        columns["param"] = fit.addresses(ordered(params))
        columns["limit"] = ordered(places) if places else [0] * len(order)
    of = table(columns, tensors[0].device)
    device = of.values.device
    partial = torch.empty((5, of.count), dtype=torch.float32, device=device)
    scale, begin = scale.to(device, torch.float32, non_blocking=True), 0
    for part in parts_of:
        of_grads = Form.of(grads[part[0]]) if grads else NOTHING
        of_first = Form.of(momenta[part[0]][0]) if momenta is not None else NOTHING
        of_params = Form.of(params[part[0]]) if params else NOTHING
        first, last = of.begins[begin], of.begins[begin + len(part)]
        begin += len(part)
        triton_launch.launch(
            device, triton_steps.sums_of_chunks, (last - first,),
            of.values, of.tensors, of.chunks[first:], of.tiles, of.count, partial[:, first:],
            scale, gamma,
            G=of_grads.format, M=of_first.format, M_SHIFT=of_first.shift, M_TOP=of_first.top,
            P=of_params.format, POWER=_POWERS.get(gamma, 2), ALIGNED=of.aligned, ROWS=ROWS,
            **OPTIONS,
        )  # fmt: skip
    return of, partial
