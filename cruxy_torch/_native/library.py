"""The fast path on CPU: a small C library, built once per machine where there is a C compiler."""

import array
import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any, cast

import numpy
import torch
from torch import Tensor

from cruxy_exact.codes import TINY
from cruxy_torch import _kept as _storage
from cruxy_torch._actuators.apply import Options, Scalars, Tensors
from cruxy_torch._kept import Coded, Kept, Rounded

SOURCE = pathlib.Path(__file__).with_name("passes.c")

_FLAGS = (
    "-O3", "-std=c11", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
)  # fmt: skip
_SIMD = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma",
               "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}  # fmt: skip

_log = logging.getLogger(__name__)


def available() -> bool:
    """Whether the library is there, building it if need be."""
    return _library() is not None


def parts(
    whole: Sequence[Sequence[Kept]],
    moments: Sequence[Sequence[Kept]] = (),
    *,
    centralize: bool = False,
) -> tuple[list[list[int]], list[int]]:
    """The rows of equally long columns that can take this path, by how moments are kept; the rest.

    All of a row must lie on the CPU and in the same order without gaps. What is coded or rounded
    belongs to a row that lies row by row and is not centralized.

    Args:
        whole: columns that must be float32, plain tensors in the first.
        moments: columns that may also be kept in fewer bits.
        centralize: whether gradients of two or more axes are.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    slow = []
    float32 = (torch.float32,) * len(whole)
    for i, row in enumerate(zip(*whole, *moments, strict=True)):
        forms = tuple(map(_form, row))
        if forms[: len(whole)] == float32 and _fits(row, forms, centralize):
            alike.setdefault(forms, []).append(i)
        else:
            slow.append(i)
    return list(alike.values()), slow


def _fits(row: Sequence[Any], forms: tuple[Any, ...], centralize: bool) -> bool:
    if not row[0].is_cpu:
        return False
    if _PLAIN.issuperset(forms):
        return all(map(Tensor.is_contiguous, row)) or all(map(_channels_last, row))
    if centralize and row[0].ndim > 1:
        return False
    tensors = [_storage.held(kept) for kept in row if not isinstance(kept, Coded)]
    return all(tensor.dtype in _PLAIN and tensor.is_contiguous() for tensor in tensors)


_PLAIN = {torch.float32, torch.bfloat16}


def _form(kept: Kept) -> Any:
    if isinstance(kept, Tensor):
        return kept.dtype
    return kept.code if isinstance(kept, Coded) else Rounded


def _channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def sums(
    grads: list[Tensor],
    gamma: float,
    scale: Tensor,
    momenta: Sequence[tuple[Kept, float]] | None = None,
) -> Tensor:
    """What `_sensors.sums` says, of tensors of one of the `parts`, in one pass."""
    out = torch.empty(4, dtype=torch.float64)
    moments = signs = None
    if momenta is not None:
        moments = ctypes.byref(_Moments([kept for kept, _ in momenta]))
        signs = (ctypes.c_float * len(grads))(*(sign for _, sign in momenta))
    _check(
        _loaded().cruxy_sums(
            len(grads),
            _addresses(grads),
            moments,
            signs,
            _counts(list(map(Tensor.numel, grads))),
            _address(scale),
            ctypes.c_double(gamma),
            torch.get_num_threads(),
            _address(out),
        )
    )
    return out[: 2 if momenta is None else 4].to(torch.float32)


def mean_squares(tensors: list[Tensor], counts: list[int]) -> Tensor:
    """The sum of the squares of each tensor over a count; float32, a vector."""
    out = torch.empty(len(tensors), dtype=torch.float64)
    _check(
        _loaded().cruxy_mean_squares(
            len(tensors),
            _addresses(tensors),
            _counts(list(map(Tensor.numel, tensors))),
            _counts(counts),
            torch.get_num_threads(),
            _address(out),
        )
    )
    return out.to(torch.float32)


def update(tensors: Tensors, scalars: Scalars, options: Options) -> None:
    """One step of Adam or Lion with the averages, on tensors of one of the `parts`.

    `scalars` are numbers.
    """
    control = (ctypes.c_float * 6)(*map(float, (*scalars[:5], scalars.average_weight)))
    decay = 0.0 if options.coupled else options.weight_decay
    coupled = options.weight_decay if options.coupled else 0.0
    option = (ctypes.c_float * 4)(decay, coupled, options.eps, float(options.nesterov))
    rows = None
    if options.centralize:
        rows = _counts([g.numel() // max(len(g), 1) if g.ndim > 1 else 0 for g in tensors.grads])
    limits = [limit.cpu() for limit in tensors.limits]
    adam = not options.lion
    _check(
        _loaded().cruxy_update(
            len(tensors.params),
            _addresses(cast(list[Tensor], tensors.params)),
            _addresses(tensors.grads),
            ctypes.byref(_Moments(tensors.exp_avgs)),
            ctypes.byref(_Moments(tensors.exp_avg_sqs)) if adam else None,
            _addresses(tensors.clocks1) if adam else None,
            _addresses(tensors.clocks2) if adam else None,
            _addresses(limits) if limits else None,
            _addresses(list(tensors.averages)) if tensors.averages else None,
            _counts(list(map(Tensor.numel, tensors.grads))),
            rows,
            _counts([0 if isinstance(m, Tensor) else m.first for m in tensors.exp_avgs]),
            control,
            option,
            int(scalars.key),
            torch.get_num_threads(),
        )
    )


_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 2}
"""`FLOAT32`, `BFLOAT16` and `BYTE` of the C source; 3 is `NIBBLE`."""


class _Moments(ctypes.Structure):
    """`Moments` of the C source: one moment of every tensor, all of one form."""

    _fields_ = [
        ("format", ctypes.c_int32),
        ("stochastic", ctypes.c_int32),
        ("is_signed", ctypes.c_int32),
        ("shift", ctypes.c_int32),
        ("top", ctypes.c_float),
        ("least", ctypes.c_float),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    ]

    def __init__(self, column: Sequence[Kept]) -> None:
        values = list(map(_storage.held, column))
        # The library reads these arrays, so that they have to live as long as this.
        self._arrays = [_addresses(values)]
        super().__init__(
            format=_FORMATS[values[0].dtype],
            stochastic=not isinstance(column[0], Tensor),
            values=ctypes.addressof(self._arrays[0]),
        )
        coded = [kept for kept in column if isinstance(kept, Coded)]
        if coded:
            code = coded[0].code
            self._arrays.append(_addresses([kept.scales for kept in coded]))
            self.scales = ctypes.addressof(self._arrays[1])
            self.format = 2 if code.bits == 8 else 3
            self.is_signed, self.top = code.signed, code.top
            self.shift = code.half.bit_length()
            self.least = code.scale(numpy.float32(TINY), xp=numpy)


def _addresses(tensors: list[Tensor]) -> ctypes.Array:
    return _counts(list(map(Tensor.data_ptr, tensors)))


def _counts(values: list[int]) -> ctypes.Array:
    column = array.array("q", values)
    return (ctypes.c_int64 * len(column)).from_buffer(column)


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _check(status: int) -> None:
    if status:
        raise MemoryError("the optimizer step could not allocate its work list")


def _loaded() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise RuntimeError("the C library is not available; check available() first")
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = (
        shlex.split(os.environ.get("CC", ""))
        or [found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))][:1]
    )
    if not compiler:
        _log.info("no C compiler found; CruxyOptimizer takes its slower path on CPU")
        return None
    simd = _SIMD.get(torch.backends.cpu.get_cpu_capability(), ())
    # Linked without -fopenmp the library finds the OpenMP runtime that torch has loaded; a second
    # one would bring threads of its own that compete with torch's. The last resort is one thread.
    for openmp, link in ((("-fopenmp",), ()), (("-fopenmp",), ("-fopenmp",)), ((), ())):
        try:
            return _load(_build(compiler, (*_FLAGS, *simd, *openmp), link))
        except (OSError, subprocess.SubprocessError) as error:
            detail = getattr(error, "stderr", None) or error
            _log.info("building the CPU kernels with %s failed: %s", compiler, detail)
    return None


def _load(path: pathlib.Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    sums, update = library.cruxy_sums, library.cruxy_update
    squares = library.cruxy_mean_squares
    sums.argtypes = [count, *[pointer] * 5, ctypes.c_double, number, pointer]
    squares.argtypes = [count, *[pointer] * 3, number, pointer]
    update.argtypes = [count, *[pointer] * 13, number, number]
    sums.restype = squares.restype = update.restype = number
    return library


def _build(compiler: list[str], flags: tuple[str, ...], link: tuple[str, ...]) -> pathlib.Path:
    """The path of the library, compiled unless the same one lies in the cache already."""
    recipe = repr((compiler, flags, link)).encode() + SOURCE.read_bytes()
    name = f"native-{hashlib.sha256(recipe).hexdigest()[:16]}"
    folder = _cache_folder()
    path = folder / f"{name}.so"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=folder) as work:
        unit, built = os.path.join(work, "native.o"), os.path.join(work, "native.so")
        for command in (
            [*compiler, *flags, "-c", str(SOURCE), "-o", unit],
            [*compiler, "-shared", unit, *link, "-lm", "-o", built],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        os.replace(built, path)  # atomic: processes that start together may all build it
    return path


def _cache_folder() -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = pathlib.Path(base, "cruxy_torch")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return pathlib.Path(_temporary_folder().name)


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="cruxy_torch_", ignore_cleanup_errors=True)
