"""Notices, once, that gradients were clipped before the controller saw them."""

import warnings

import torch
from torch import Tensor

from cruxy_torch._law_state import REPORT

LOOKS = range(4, 10)
"""The steps that are looked at."""


class ClippedCheck:
    """Compares the gradient norms of a few steps.

    A Euclidean norm that stays the same while the gamma norm moves is a norm that something else
    has set, as `clip_grad_norm_` does: sensors see nothing but the threshold then. Looks where it
    costs no wait, on the CPU.
    """

    def __init__(self) -> None:
        self._step = 0
        self._seen: list[tuple[float, float]] = []

    def look(self, report: Tensor) -> None:
        """Takes in one step's report."""
        if self._step >= LOOKS.stop or not report.is_cpu or torch.compiler.is_compiling():
            return
        if self._step in LOOKS:
            numbers = dict(zip(REPORT, report.tolist(), strict=True))
            self._seen.append((numbers["grad_norm"], numbers["gamma_norm"]))
        self._step += 1
        if self._step == LOOKS.stop and self._pinned():
            warnings.warn(
                f"the gradient norm is {self._seen[-1][0]:.4g} step after step: something clips "
                "gradients before the optimizer sees them, and blinds its controller; take away "
                "clip_grad_norm_, max_grad_norm or gradient_clip_val, since it clips by itself.",
                stacklevel=4,
            )

    def _pinned(self) -> bool:
        norms, gammas = zip(*self._seen, strict=True)
        if not min(norms) > 0.0:
            return False
        still = max(norms) - min(norms) <= 1e-5 * max(norms)
        return still and max(gammas) - min(gammas) > 1e-3 * max(gammas)
