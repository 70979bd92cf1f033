"""Exact elementwise arithmetic: the same bits in NumPy, PyTorch and compiled by JAX."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("jax")

from cruxy_exact import arithmetic as A  # noqa: N812
from cruxy_exact import attention, initial
from cruxy_exact.random_bits import stream_key
from exact_arrays import NAMES, normal, run, same

N = 100_000
A4 = [normal(N, seed=seed) for seed in range(4)]

FUNCTIONS = {
    "exp": (lambda x, xp: A.exp(x * 16.0, xp=xp), np.exp, 2e-7),
    "log": (lambda x, xp: A.log(xp.abs(x) + 1e-3, xp=xp), None, None),
    "sigmoid": (A.sigmoid, None, None),
    "tanh": (A.tanh, np.tanh, 3e-7),
    "erf": (A.erf, np.vectorize(math.erf), 4.4e-7),
    "sqrt": (lambda x, xp: A.sqrt(xp.abs(x), xp=xp), None, None),
    "cos_pi": (lambda x, xp: A.cos_pi(xp.abs(x) - xp.floor(xp.abs(x)), xp=xp), None, None),
}

EXPRESSIONS = {
    "a*b+c": lambda a, b, c, d, xp: A.mul(a, b, xp=xp) + c,
    "a*b+0.7": lambda a, b, c, d, xp: A.mul(a, b, xp=xp) + A.f32(0.7),
    "a*b+c*d": lambda a, b, c, d, xp: A.mul(a, b, xp=xp) + A.mul(c, d, xp=xp),
    "chain": lambda a, b, c, d, xp: A.sub(
        A.mul(A.mul(a, b, xp=xp) + c, d, xp=xp), A.mul(a, c, xp=xp), xp=xp
    ),
    "a/b": lambda a, b, c, d, xp: A.div(a, b, xp=xp),
    "a/3": lambda a, b, c, d, xp: A.div(a, xp.full_like(a, 3.0), xp=xp),
    "a/sqrt(b)": lambda a, b, c, d, xp: A.div(a, A.sqrt(xp.abs(b), xp=xp), xp=xp),
    "a*c1*c2": lambda a, b, c, d, xp: A.mul(A.mul(a, A.f32(1.1), xp=xp), A.f32(1.3), xp=xp),
}
"""What compilers contract or rewrite."""


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_have_the_bits_they_have_in_numpy(function, name):
    call = FUNCTIONS[function][0]
    x = np.concatenate([A4[0] * 3, np.float32([0, -0.0, np.inf, -np.inf, np.nan, 2e-38, 90, -90])])
    assert same(run(call, x, name=name), run(call, x, name="numpy"))


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_that_compilers_rewrite_have_the_bits_they_have_in_numpy(expression, name):
    call = EXPRESSIONS[expression]
    assert same(run(call, *A4, name=name), run(call, *A4, name="numpy"))


def test_without_settle_a_compiler_contracts():
    """The negative control: were it to agree, the tests above would show nothing."""
    plain = lambda a, b, c, d, xp: a * b + c  # noqa: E731
    assert not same(run(plain, *A4, name="jax.numpy"), run(plain, *A4, name="numpy"))


COMPILED = """
import jax, jax.numpy as jnp
from cruxy_exact import arithmetic as A
from test_exact_arithmetic import EXPRESSIONS, FUNCTIONS
with jax.enable_x64(True):
    for shape in ((), (1000,)):
        args = [jnp.ones(shape, jnp.float32)] * 4
        jax.jit(lambda *x: [call(*x, xp=jnp) for call in EXPRESSIONS.values()])(*args)
        jax.jit(lambda x: [row[0](x, xp=jnp) for row in FUNCTIONS.values()])(args[0])
"""


def test_no_compiled_code_divides_in_float32_or_contracts_a_product_that_is_rounded(tmp_path):
    """What LLVM makes of it for a CPU, where both would give the same bits, and on a GPU would not.

    A GPU's float32 quotient is 2 units off, and its code contracts whatever product stands in a
    sum.
    """
    here = Path(__file__).parent
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_dump_to={tmp_path}",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    subprocess.run([sys.executable, "-c", COMPILED], env=environment, check=True)
    found = sorted(tmp_path.glob("*ir-with-opt.ll"))
    wide = 0
    for path in found:
        values: dict[str, str] = {}
        for line in path.read_text().splitlines():
            name, _, text = line.strip().partition(" = ")
            values[name] = text
            narrow = re.search(r"^fdiv (<\d+ x )?float|@llvm\.sqrt\.(v\d+)?f32\b", text)
            assert not narrow, (path.name, line)
            wide += bool(re.search(r"^fdiv (<\d+ x )?double|@llvm\.sqrt\.(v\d+)?f64\b", text))
            if re.match("f(add|sub) .*float", text):
                terms = [values.get(term, "") for term in re.findall(r"%[\w.]+", text)]
                products = [term for term in terms if term.startswith("fmul")]
                assert all(map(is_exact, products)), (path.name, line, products)
    assert wide > 10  # it was read at all


def is_exact(product):
    """Whether a product of LLVM's loses nothing: by 0, a power of two, or the short ln 2."""
    number = re.search(r"(f0x[0-9A-F]+|-?\d[\d.]*e[+-]\d+)\)?(,|$)", product)
    if number is None:
        return False
    text = number[1]
    bits = int(text[3:], 16) if text.startswith("f0x") else None
    value = float(text) if bits is None else float(np.uint32(bits).view(np.float32))
    return value in (0.0, A.LN2_HI) or abs(math.frexp(value)[0]) == 0.5


@pytest.mark.parametrize("function", [name for name, row in FUNCTIONS.items() if row[1]])
def test_functions_are_as_near_to_the_true_value_as_they_say(function):
    x = np.linspace(-5, 5, 20_001).astype(np.float32)
    _, true, bound = FUNCTIONS[function]
    got = run(getattr(A, function), x, name="numpy").astype(float)
    want = true(x.astype(float))
    size = np.abs(want) if function == "exp" else 1.0
    assert np.max(np.abs(got - want) / size) <= bound


def test_logarithm_is_within_two_units_in_the_last_place():
    x = np.exp(np.linspace(-80, 80, 50_001)).astype(np.float32)
    got, want = run(A.log, x, name="numpy").astype(float), np.log(x.astype(float))
    unit = np.spacing(np.maximum(np.abs(want), 0.5).astype(np.float32)).astype(float)
    assert np.max(np.abs(got - want) / unit) <= 1.9


def test_cosine_for_schedules_is_exact_at_its_ends_and_its_middle():
    assert run(A.cos_pi, np.float32([0, 0.5, 1]), name="numpy").tolist() == [1, 0, -1]


def test_cosine_for_schedules_is_within_two_roundings():
    t = np.linspace(0, 1, 10_001).astype(np.float32)
    got = run(A.cos_pi, t, name="numpy")
    assert np.max(np.abs(got - np.cos(np.pi * t.astype(float)))) <= 2**-23


@pytest.mark.parametrize("name", NAMES)
def test_what_is_tiny_or_a_negative_zero_becomes_zero(name):
    x = np.float32([2.0**-125, -(2.0**-125), -0.0, 2.0**-149, 2.0**-124])
    settled = run(A.settle, x, name=name)
    assert settled.view(np.int32).tolist() == [0, 0, 0, 0, np.float32(2.0**-124).view(np.int32)]


def test_settle_keeps_the_dtype_of_weakly_typed_arrays():
    """As `jnp.full` makes them, which a number would make float64 where 64 bits are on."""
    import jax

    x = jax.numpy.full(2, 0.5)
    with jax.enable_x64(True):
        assert A.settle(x, xp=jax.numpy).dtype == np.float32
        assert A.div(x, x, xp=jax.numpy).dtype == np.float32


@pytest.mark.parametrize("name", NAMES)
def test_settle_keeps_nan_and_infinity(name):
    x = np.tile(np.float32([np.nan, np.inf, -np.inf, 1.0]), 16)
    assert same(run(A.settle, x, name=name), x)


@pytest.mark.parametrize("name", NAMES[1:])
def test_products_and_differences_around_the_smallest_normal_number_agree(name):
    """XLA finds a denormal after rounding, NumPy before: plain products differ in this corner."""
    edge = np.float32(1 - 2.0**-24) * np.float32(2.0**-63)
    a = np.concatenate([np.full(8, edge), A4[0] * np.float32(2.0**-63)])
    b = np.concatenate([np.full(8, np.float32(2.0**-63)), A4[1] * np.float32(2.0**-62)])

    def small(a, b, xp):
        a, b = A.mul(a, 2.0**-61, xp=xp), A.mul(b, 2.0**-61, xp=xp)
        return A.sub(a, b, xp=xp)

    for call in (A.mul, small):
        assert same(run(call, a, b, name=name), run(call, a, b, name="numpy"))


def test_a_root_or_quotient_off_by_three_units_rounds_to_the_same_float32():
    """Why division and roots go through float64: libraries differ there by as much."""
    x = np.arange(2**23, 2**25, 97).astype(np.float64) * 2.0**-23
    root = np.sqrt(x.astype(np.float32).astype(np.float64))
    off = [root]
    for side in (0.0, 9.0):
        near = root
        for _ in range(3):
            near = np.nextafter(near, side)
        off.append(near)
    assert same(off[1].astype(np.float32), off[0].astype(np.float32))
    assert same(off[2].astype(np.float32), off[0].astype(np.float32))


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("draw", [initial.uniform, initial.normal])
def test_initial_values_have_the_bits_they_have_in_numpy(draw, name):
    call = lambda step, xp: draw((50, 30), 0.3, stream_key(step, 7, 3, xp=xp), xp=xp)  # noqa: E731
    step = np.zeros((), np.int32)
    assert same(run(call, step, name=name), run(call, step, name="numpy"))


def test_normal_initial_values_have_the_deviation_they_are_asked_for():
    key = run(lambda step, xp: stream_key(step, 7, 3, xp=xp), np.zeros((), np.int32), name="numpy")
    with np.errstate(over="ignore"):
        x = initial.normal((200_000,), 0.5, key, xp=np)
    assert abs(x.std() - 0.5) < 4 * 0.5 / math.sqrt(2 * x.size)


def test_rotary_tables_are_rounded_cosines():
    cosines, _ = attention.rotary_table(300, 16)
    want = [[math.cos(p * 10000 ** (-2 * i / 16)) for i in range(8)] for p in range(300)]
    assert np.max(np.abs(np.array(cosines) - want)) <= 2**-25 + 1e-12
