"""What every test runs under: eight CPU devices, and pages whose Python blocks are run."""

import ctypes
import os
import sys
from collections.abc import Iterator
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

# JAX reads these when it is imported or first looks for devices, so they come before any test's
# import of it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = ["--xla_force_host_platform_device_count=8"]
# Compiling is nearly all of the tests' time, and most programs run for a millisecond. So they are
# compiled in a hurry, for a seventh of the time; what holds bits asks for the usual way.
if os.environ["JAX_PLATFORMS"] == "cpu" and find_spec("jaxlib"):
    FLAGS.append("--xla_backend_optimization_level=0")
    # From jaxlib 0.11 on there is but one way to compile a fusion.
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
        FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()

# Side by side, workers of as many threads as there are cores wait for each other: what is tested is
# so small that one thread each is several times faster.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Most compile the same few programs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


LIBC = ctypes.CDLL(None) if os.name == "posix" else None

# What compiles Triton's kernels cannot be imported without it.
collect_ignore = [] if find_spec("triton") else ["tests/triton_builds.py"]


@pytest.fixture(scope="module", autouse=True)
def without_compiled_programs() -> Iterator[None]:
    """Lets go of a file's programs after it: those of all files together take gigabytes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    if hasattr(LIBC, "malloc_trim"):  # glibc keeps what was freed, half of all memory in the end
        LIBC.malloc_trim(0)


@pytest.fixture
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the files that a page's example writes out of the checkout."""
    monkeypatch.chdir(tmp_path)


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(doctest_optionflags=ELLIPSIS | NORMALIZE_WHITESPACE)],
    patterns=["README.md", "docs/*.md"],
    # A page about libraries that are not installed is not run.
    excludes=[] if find_spec("equinox") and find_spec("haiku") else ["docs/equinox_haiku.md"],
    fixtures=["in_an_empty_directory"],
).pytest()
