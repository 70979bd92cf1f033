"""`detect_anomaly`: an error that names the gradients that are not finite."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cruxy_torch._distributed.shards import add_shards, local


def nonfinite(gradient: Tensor) -> Tensor:
    """How many elements of a gradient are NaN or infinite, on this rank; float32, 0-d."""
    return (~torch.isfinite(local(gradient.detach()))).sum(dtype=torch.float32)


def raise_if_any(
    counts: Sequence[Tensor], gradients: Sequence[Tensor], params: Sequence[Tensor], names: Mapping
) -> None:
    """Raises where an element of any gradient is not finite; waits for the device once.

    Args:
        counts: of each gradient, from `nonfinite`.
        gradients: the gradients, or tensors sharded as they are.
        params: whose they are.
        names: of parameters.

    Raises:
        FloatingPointError: with the name and the count of each.
    """
    if not counts:
        return
    home = counts[0].device
    total = torch.stack([count.to(home) for count in counts])
    add_shards(total, gradients)
    found = [(names[p], int(n)) for p, n in zip(params, total.tolist(), strict=True) if n]
    if found:
        listed = ", ".join(f"{name} ({count:,})" for name, count in found)
        raise FloatingPointError(
            f"gradients must be finite under detect_anomaly=True, got NaN or infinities in {listed}"
            "; lower the rate or look for the layer with torch.autograd.detect_anomaly(). "
            "detect_anomaly=False skips such steps and counts them."
        )
