"""The C library on CPU: built once per machine where there is a C compiler, and called."""

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

import torch

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


def call(name: str, arguments: ctypes.Structure) -> None:
    """Calls a function of the library.

    Args:
        name: of the function.
        arguments: its one argument, whose fields are those of the C struct of that name.

    Raises:
        RuntimeError: where the library is not available.
        MemoryError: where the function found no memory for its work list.
    """
    library = _library()
    if library is None:
        raise RuntimeError("the C library is not available; check available() first")
    if getattr(library, name)(ctypes.addressof(arguments)):
        raise MemoryError("the optimizer step could not allocate its work list")


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
    for name in ("cruxy_sums", "cruxy_mean_squares", "cruxy_update"):
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int
    return library


def _build(compiler: list[str], flags: tuple[str, ...], link: tuple[str, ...]) -> pathlib.Path:
    """The path of the library, compiled unless the same one lies in the cache already."""
    sources = sorted(SOURCE.parent.glob("*.[ch]"))
    recipe = repr((compiler, flags, link)).encode() + b"".join(s.read_bytes() for s in sources)
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
