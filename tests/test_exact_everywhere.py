"""The same digest at every instruction set, thread count and engine; controls that must differ."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from exact_prototype import GRAINS, WHOLE

pytest.importorskip("torch")
pytest.importorskip("jax")

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


def in_a_process(*arguments, **environment):
    """What Python prints in a process of its own, whose programs are compiled the usual way."""
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    base = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": path, **base, **environment},
        cwd=HERE.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, (run.stdout + run.stderr)[-2000:]
    return run.stdout.strip()


def train(*arguments, **environment):
    """The digest that `exact_prototype.py` prints."""
    return in_a_process(str(HERE / "exact_prototype.py"), *arguments, **environment)


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_pytorch_at_every_instruction_set(isa, threads):
    assert train("torch", ATEN_CPU_CAPABILITY=isa, OMP_NUM_THREADS=threads) == WHOLE


@pytest.mark.parametrize("isa", ["SSE4_2", "AVX", "AVX2", "AVX512"])
def test_jax_at_every_instruction_set(isa):
    assert train("jax", XLA_FLAGS=f"--xla_cpu_max_isa={isa}") == WHOLE


@pytest.mark.parametrize("core", ["Prescott", "Haswell", ""])
def test_numpy_at_every_core_of_its_blas(core):
    environment = {"OPENBLAS_CORETYPE": core} if core else {}
    assert train("numpy", **environment) == WHOLE


@pytest.mark.parametrize("engine", ["int8", "int8_direct", "digits"])
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_every_engine(framework, engine):
    assert train(framework, engine) == WHOLE


def test_int8_without_vnni_is_replaced_where_it_saturates():
    assert train("torch", "int8", ONEDNN_MAX_CPU_ISA="AVX2") == WHOLE


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_grains_of_one_sequence(framework):
    assert train(framework, "f64", "1") == GRAINS


@pytest.mark.parametrize("allowed", ["true", "false"])
def test_jax_with_and_without_excess_precision(allowed):
    """Which lets XLA leave out a conversion to a smaller type and back."""
    assert train("jax", XLA_FLAGS=f"--xla_allow_excess_precision={allowed}") == WHOLE


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *(("ATEN_CPU_CAPABILITY", isa) for isa in ("default", "avx2", "avx512")),
        *(("XLA_FLAGS", f"--xla_cpu_max_isa={isa}") for isa in ("SSE4_2", "AVX", "AVX2", "AVX512")),
    ],
)
def test_every_function_at_every_instruction_set(variable, value):
    """Elementwise functions and expressions, without what `conftest.py` sets for other tests."""
    chosen = "bits_they_have_in_numpy or agree"
    tests = ["-m", "pytest", "-q", "--noconftest", str(HERE / "test_exact_arithmetic.py")]
    in_a_process(*tests, "-k", chosen, **{variable: value})


def test_fast_math_is_another_run():
    """The negative control."""
    assert train("jax", XLA_FLAGS="--xla_cpu_enable_fast_math=true") != WHOLE
