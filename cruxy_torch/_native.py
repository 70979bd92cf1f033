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

from cruxy_control.codes import TINY
from cruxy_torch._kernels import Options, Scalars, Tensors
from cruxy_torch._storage import Coded, Kept, Rounded

SOURCE = pathlib.Path(__file__).with_name("_native.c")

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


def split(columns: Sequence[Sequence[Tensor]]) -> tuple[list[int], list[int]]:
    """The rows of equally long columns of tensors that can take this path, and the others.

    All of a row must lie on the CPU, be float32 and in the same order without gaps. The third
    column, first moments, may be bfloat16 as a whole.
    """
    kinds = [torch.float32] * len(columns)
    if len(columns) > 2 and columns[2] and columns[2][0].dtype is torch.bfloat16:
        kinds[2] = torch.bfloat16
    unfit = {i for i, t in enumerate(columns[0]) if not t.is_cpu}
    for column, kind in zip(columns, kinds, strict=True):
        unfit |= {i for i, t in enumerate(column) if t.dtype is not kind or not t.is_contiguous()}
    for i in list(unfit):
        row = list(zip((column[i] for column in columns), kinds, strict=True))
        if row[0][0].is_cpu and all(t.dtype is kind and _channels_last(t) for t, kind in row):
            unfit.remove(i)
    return [i for i in range(len(columns[0])) if i not in unfit], sorted(unfit)


def parts(tensors: Tensors, options: Options) -> tuple[list[list[int]], list[int]]:
    """The parameters that `update` can take, by how their moments are kept, and the others.

    What is coded or rounded belongs to a parameter that lies row by row and is not centralized.
    """
    columns = [column for column in tensors[:4] if column]
    if _PLAIN.issuperset(type(kept) for column in columns for kept in column):
        fast, slow = split(cast(Any, columns))
        return [fast] if fast else [], slow
    alike: dict[tuple[Any, ...], list[int]] = {}
    slow = []
    for i, row in enumerate(zip(*columns, strict=True)):
        if _fits(row, options):
            alike.setdefault(tuple(map(_form, row[2:])), []).append(i)
        else:
            slow.append(i)
    return list(alike.values()), slow


_PLAIN = {Tensor, torch.nn.Parameter}


def _fits(row: Sequence[Kept], options: Options) -> bool:
    if isinstance(row[0], Rounded):  # a bfloat16 parameter
        return False
    tensors = [kept for kept in row if isinstance(kept, Tensor)]
    if len(tensors) < len(row):
        whole = [*tensors, *(kept.values for kept in row if isinstance(kept, Rounded))]
        if not all(tensor.is_contiguous() for tensor in whole):
            return False
        if options.centralize and tensors[0].ndim > 1:
            return False
    return bool(split([[tensor] for tensor in tensors])[0])


def _form(kept: Kept) -> Any:
    return kept.code if isinstance(kept, Coded) else getattr(kept, "dtype", Rounded)


def _channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def sums(grads: list[Tensor], gamma: float, scale: Tensor) -> Tensor:
    """`sum g^2` and `sum |g|^gamma` of gradients times `scale`, in one pass; float32, `(2,)`."""
    out = torch.empty(2, dtype=torch.float64)
    _check(
        _loaded().cruxy_sums(
            len(grads),
            _addresses(grads),
            _counts(list(map(Tensor.numel, grads))),
            _address(scale),
            ctypes.c_double(gamma),
            torch.get_num_threads(),
            _address(out),
        )
    )
    return out.to(torch.float32)


def update(tensors: Tensors, scalars: Scalars, options: Options) -> None:
    """One step of Adam or Lion on tensors of one of the `parts`; `scalars` are numbers."""
    control = (ctypes.c_float * 5)(*map(float, scalars[:5]))
    decay = 0.0 if options.coupled else options.weight_decay
    coupled = options.weight_decay if options.coupled else 0.0
    option = (ctypes.c_float * 4)(decay, coupled, options.eps, float(options.nesterov))
    rows = None
    if options.centralize:
        rows = _counts([g.numel() // max(len(g), 1) if g.ndim > 1 else 0 for g in tensors.grads])
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
            _addresses(list(tensors.limits)) if tensors.limits else None,
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
        values = [kept if isinstance(kept, Tensor) else kept[0] for kept in column]
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
    sums.argtypes = [count, *[pointer] * 3, ctypes.c_double, number, pointer]
    update.argtypes = [count, *[pointer] * 12, number, number]
    sums.restype = update.restype = number
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
