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

import torch
from torch import Tensor

from cruxy_torch._kernels import Options, Scalars, Tensors

SOURCE = pathlib.Path(__file__).with_name("_native.c")

_FLAGS = ("-O3", "-std=c11", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_SIMD = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma",
               "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}  # fmt: skip

_log = logging.getLogger(__name__)


def available() -> bool:
    """Whether the library is there, building it if need be."""
    return _library() is not None


def split(columns: Sequence[list[Tensor]]) -> tuple[list[int], list[int]]:
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
    """One step of Adam or Lion on every tensor, in one pass; `scalars` are numbers."""
    control = (ctypes.c_float * 5)(*map(float, scalars))
    decay = 0.0 if options.coupled else options.weight_decay
    coupled = options.weight_decay if options.coupled else 0.0
    option = (ctypes.c_float * 4)(decay, coupled, options.eps, float(options.nesterov))
    rows = None
    if options.centralize:
        rows = _counts([p.numel() // max(len(p), 1) if p.ndim > 1 else 0 for p in tensors.params])
    adam = not options.lion
    _check(
        _loaded().cruxy_update(
            len(tensors.params),
            _addresses(tensors.params),
            _addresses(tensors.grads),
            _addresses(tensors.exp_avgs),
            int(tensors.exp_avgs[0].dtype is torch.bfloat16),
            _addresses(tensors.exp_avg_sqs) if adam else None,
            _addresses(tensors.clocks1) if adam else None,
            _addresses(tensors.clocks2) if adam else None,
            _counts(list(map(Tensor.numel, tensors.params))),
            rows,
            control,
            option,
            torch.get_num_threads(),
        )
    )


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
    update.argtypes = [count, *[pointer] * 3, number, *[pointer] * 7, number]
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
