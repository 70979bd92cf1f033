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
from collections.abc import Iterator
from typing import NamedTuple

import torch

SOURCES = tuple(pathlib.Path(__file__).with_name(name) for name in ("passes.c", "exact.c"))

EXACT = (
    "quantize", "round", "total", "gelu_forward", "gelu_backward", "layer_norm_forward",
    "layer_norm_backward", "softmax_forward", "softmax_backward", "cross_entropy_forward",
    "dropout_forward", "adamw",
)  # fmt: skip
"""What `exact.c` has, without `cruxy_exact_`."""

_FLAGS = (
    "-O3", "-std=c11", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
)  # fmt: skip
_SIMD = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma",
               "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}  # fmt: skip

_log = logging.getLogger(__name__)


NOT_BUILT = "not built yet: the first step on CPU builds it, as does backends(build=True)"
_NO_COMPILER = "no C compiler found: cc, gcc or clang, or the variable CC"


class Found(NamedTuple):
    """What has come of looking for the library.

    Attributes:
        handle: the library; `None` where it is not there.
        path: its file.
        flags: what it was compiled with.
        why: why it is not there, in one line.
    """

    handle: ctypes.CDLL | None = None
    path: pathlib.Path | None = None
    flags: tuple[str, ...] = ()
    why: str = ""


def available() -> bool:
    """Whether the library is there, building it if need be."""
    return _library().handle is not None


def found(*, build: bool) -> Found:
    """The library, or why it is not there.

    Args:
        build: builds it if need be; otherwise one that was built before is loaded.
    """
    if build or _library.cache_info().currsize:
        return _library()
    try:
        compiler = _compiler()
    except LookupError as error:
        return Found(why=str(error))
    for flags, link in _recipes():
        path = _path(compiler, flags, link)
        if path.exists():
            return _opened(path, flags)
    return Found(why=NOT_BUILT)


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
    if library.handle is None:
        raise RuntimeError(f"the C library is not available: {library.why}")
    if getattr(library.handle, name)(ctypes.addressof(arguments)):
        raise MemoryError("the optimizer step could not allocate its work list")


@functools.cache
def _library() -> Found:
    try:
        compiler, result = _compiler(), Found()
    except LookupError as error:
        _log.info("%s; CruxyOptimizer takes its slower path on CPU", error)
        return Found(why=str(error))
    for flags, link in _recipes():
        try:
            result = _opened(_build(compiler, flags, link), flags)
        except (OSError, subprocess.SubprocessError) as error:
            result = Found(flags=flags, why=_last_line(error, compiler))
        if result.handle is not None:
            return result
        _log.info("building the CPU kernels with %s failed: %s", compiler, result.why)
    return result


def _compiler() -> list[str]:
    """The command of the C compiler.

    Raises:
        LookupError: where there is none, or `CC` is no command.
    """
    text = os.environ.get("CC", "")
    try:
        named = shlex.split(text)
    except ValueError as error:
        raise LookupError(f"CC must be a command, got {text!r}: {error}") from error
    found = named or [path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))][:1]
    if not found:
        raise LookupError(_NO_COMPILER)
    return found


def _recipes() -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Flags for compiling and for linking, in the order in which they are tried.

    Linked without -fopenmp the library finds the OpenMP runtime that torch has loaded; a second one
    would bring threads of its own that compete with torch's. The last resort is one thread.
    """
    simd = _SIMD.get(torch.backends.cpu.get_cpu_capability(), ())
    for openmp, link in ((("-fopenmp",), ()), (("-fopenmp",), ("-fopenmp",)), ((), ())):
        yield (*_FLAGS, *simd, *openmp), link


def _last_line(error: Exception, compiler: list[str]) -> str:
    """The last line of what a compiler said, or of what kept it from being run."""
    if isinstance(error, subprocess.CalledProcessError):
        said = error.stderr or f"{shlex.join(compiler)} ended with exit status {error.returncode}"
    else:
        said = str(error)
    return (said.strip().splitlines() or [type(error).__name__])[-1].strip()


def _opened(path: pathlib.Path, flags: tuple[str, ...]) -> Found:
    try:
        return Found(_load(path), path, flags)
    except OSError as error:
        return Found(path=path, flags=flags, why=_last_line(error, []))


def _load(path: pathlib.Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    exact = (f"cruxy_exact_{name}" for name in EXACT)
    for name in ("cruxy_sums", "cruxy_mean_squares", "cruxy_update", *exact):
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int
    return library


def _path(compiler: list[str], flags: tuple[str, ...], link: tuple[str, ...]) -> pathlib.Path:
    """Where the library of this recipe lies, whether it has been built or not."""
    sources = sorted(SOURCES[0].parent.glob("*.[ch]"))
    recipe = repr((compiler, flags, link)).encode() + b"".join(s.read_bytes() for s in sources)
    return _cache_folder() / f"native-{hashlib.sha256(recipe).hexdigest()[:16]}.so"


def _build(compiler: list[str], flags: tuple[str, ...], link: tuple[str, ...]) -> pathlib.Path:
    """The path of the library, compiled unless the same one lies in the cache already."""
    path = _path(compiler, flags, link)
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        units = [os.path.join(work, source.stem + ".o") for source in SOURCES]
        built = os.path.join(work, "native.so")
        for command in (
            *([*compiler, *flags, "-c", str(source), "-o", unit]
              for source, unit in zip(SOURCES, units, strict=True)),
            [*compiler, "-shared", *units, *link, "-lm", "-o", built],
        ):  # fmt: skip
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
