"""Which tensors Triton takes."""

from collections.abc import Sequence
from typing import Any

import torch

from cruxy_torch._kept import Kept
from cruxy_torch._native import fit, triton_found

_PLAIN = frozenset({torch.float32, torch.bfloat16})


def parts(
    whole: Sequence[Sequence[Kept]],
    moments: Sequence[Sequence[Any]] = (),
    *,
    centralize: bool = False,
) -> tuple[list[list[int]], list[int]]:
    """See `fit.parts`; none at all where Triton has been set aside."""
    devices = {row[0].device for row in zip(*whole[:1], strict=True)}
    if all(map(triton_found.available, devices)):
        return fit.parts(_rules(), whole, moments, centralize=centralize)
    return [], list(range(len(whole[0])))


def misfit(whole: Sequence[Kept], moments: Sequence[Any], *, centralize: bool = False) -> str:
    """See `fit.misfit`."""
    found = triton_found.found(whole[0].device)
    return found.why or fit.misfit(_rules(), whole, moments, centralize=centralize)


def _rules() -> fit.Rules:
    device = "cpu" if triton_found.interpreted() else "cuda"
    return fit.Rules(device, _PLAIN, rounded=True, centralized=False)
