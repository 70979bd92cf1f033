"""How a kernel of Triton is started, and in which form a tensor is handed to it."""

import contextlib
from typing import Any, NamedTuple

import numpy
import torch

from cruxy_exact.codes import TINY
from cruxy_torch._kept import Coded, Kept, Rounded, raw
from cruxy_torch._native import fit, triton_found

WARPS = 4
"""Groups of 32 threads to a program."""

OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}
"""What every kernel is compiled with."""

UPDATE_OPTIONS = OPTIONS | {"maxnreg": 128}
"""Left to itself the assembler spills a few numbers to have more programs at a time."""

_FORMATS = {torch.float32: 0, torch.bfloat16: 1}


class Form(NamedTuple):
    """How a column is kept, as the kernels take it.

    Attributes:
        format: float32 (0), bfloat16 (1), a byte (2), half a byte (3), or nothing (-1).
        chance: whether it is rounded by chance.
        shift: see `BlockCode`, as the next two.
        top: likewise.
        least: the smallest scale that is not 0.
    """

    format: int
    chance: bool = False
    shift: int = 1
    top: float = 1.0
    least: float = 1.0

    @classmethod
    def of(cls, kept: Kept) -> "Form":
        """That of a tensor."""
        if isinstance(kept, Coded):
            code = kept.code
            least = float(code.scale(numpy.float32(TINY), xp=numpy))
            return cls(2 if code.bits == 8 else 3, True, code.half.bit_length(), code.top, least)
        return cls(_FORMATS[raw(kept).dtype], isinstance(kept, Rounded))

    def named(self, letter: str) -> dict[str, Any]:
        """As a kernel takes it, of `M` for the first moment or `V` for the second."""
        names = ("", "_CHANCE", "_SHIFT", "_TOP", "_LEAST")
        return {letter + name: value for name, value in zip(names, self, strict=True)}


NOTHING = Form(-1)
"""Of what is not there."""


def launch(
    device: torch.device, kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any
) -> None:
    """Starts a kernel; one that fails to compile or to start is set aside.

    Nothing has been written then: what fails later, while it runs, comes as an error of CUDA at a
    place that waits for it, and nothing can go on after that.

    Raises:
        SetAsideError: where it failed.
    """
    here: Any = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with here:
        try:
            kernel[grid](*args, **kwargs)
        except Exception as error:  # whatever a compiler, a cache or a driver may raise
            triton_found.set_aside(device, error)
            raise fit.SetAsideError(str(error)) from error
