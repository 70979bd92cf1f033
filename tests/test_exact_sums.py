"""Exact sums and products: right to the bound, alike in every engine, NaN where it belongs."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("jax")

from hypothesis import given, settings
from hypothesis import strategies as st

from cruxy_exact import engines, sums
from cruxy_exact.engines import ENGINES, Precision
from exact_arrays import NAMES, array, namespace, normal, run, same
from relatives import crossed

BITS = (8, 13, 20, 22, 23)


def product(a, b, name, **precision):
    call = lambda a, b, xp: sums.matmul(a, b, precision=Precision(**precision), xp=xp)  # noqa: E731
    return run(call, a, b, name=name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "bits", [20, *(pytest.param(bits, marks=pytest.mark.slow) for bits in BITS if bits != 20)]
)
def test_every_engine_gives_the_same_bits(bits, engine, name):
    a, b = normal(2, 9, 70) * 2.0 ** normal(2, 9, 1, scale=40), normal(2, 70, 5, seed=1)
    assert same(product(a, b, name, bits=bits, engine=engine), product(a, b, "numpy", bits=bits))


@pytest.mark.parametrize(("length", "engine"), crossed([8192, 8193, 20000], ENGINES))
def test_long_inner_axes_of_extreme_numbers_are_exact(length, engine):
    a = np.full((3, length), 1 - 2.0**-24, np.float32)
    a[1, ::2] *= -1
    b = np.full((length, 2), 1 - 2.0**-24, np.float32)
    b[:, 1] = normal(length)
    qa, qb = (sums.quantize(x, axis, 20, xp=np)[0] for x, axis in ((a, -1), (b, -2)))
    want = [[sum(int(x) * int(y) for x, y in zip(row, c, strict=True)) for c in qb.T] for row in qa]
    for name in NAMES:
        precision = Precision(engine=engine)
        call = lambda a, b, xp: engines.multiply(a, b, precision, xp=xp)  # noqa: B023, E731
        assert run(call, qa, qb, name=name).tolist() == want


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", ENGINES)
def test_nan_and_infinity_stay_in_their_row_and_column(engine, name):
    a, b = normal(8, 32), normal(32, 8, seed=1)
    clean = product(a, b, name, engine=engine)
    a[2, 3], a[5, 1], b[4, 6] = np.nan, np.inf, -np.inf
    got = product(a, b, name, engine=engine)
    lost = np.zeros((8, 8), bool)
    lost[[2, 5]] = lost[:, 6] = True
    assert np.isnan(got).tolist() == lost.tolist()
    assert same(got[~lost], clean[~lost])


@pytest.mark.parametrize(
    "name", ["numpy", "torch", pytest.param("jax.numpy", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_products_of_nothing_are_zeros(shape, engine, name):
    m, k, n = shape
    got = product(np.zeros((m, k), np.float32), np.zeros((k, n), np.float32), name, engine=engine)
    assert same(got, np.zeros((m, n), np.float32))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31), bits=st.sampled_from(BITS), spread=st.floats(0, 12),
    outlier=st.sampled_from([1.0, 1e3, 1e-30, 1e30]), length=st.integers(1, 600),
)  # fmt: skip
def test_a_product_is_within_its_bound(seed, bits, spread, outlier, length):
    r = np.random.default_rng(seed)
    a = (r.standard_normal((4, length)) * 2.0 ** (r.standard_normal((4, length)) * spread)).astype(
        np.float32
    )
    b = normal(length, 3, seed=seed + 1)
    a[0, 0] = np.clip(float(a[0, 0]) * outlier, -1e36, 1e36)  # no product overflows
    got = product(a, b, "numpy", bits=bits).astype(float)
    a, b = a.astype(float), b.astype(float)
    alpha, beta = np.abs(a).max(1, keepdims=True), np.abs(b).max(0, keepdims=True)
    sums_b, sums_a = np.abs(b).sum(0, keepdims=True), np.abs(a).sum(1, keepdims=True)
    bound = 2.0**-bits * (alpha * sums_b + beta * sums_a)
    bound += length * alpha * beta * 2.0 ** (-2 * bits) + 2.0**-24 * np.abs(a @ b)
    assert (np.abs(got - a @ b) <= bound * (1 + 1e-6) + sums.f32(2.0**-125)).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.integers(-90, 90), n=st.integers(1, 500))
def test_a_sum_is_within_its_bound(seed, scale, n):
    x = normal(n, seed=seed) * np.float32(2.0**scale)
    got, want = float(sums.total(x, xp=np)), float(x.astype(float).sum())
    assert abs(got - want) <= n * float(np.abs(x).max()) * 2.0**-30 + 2.0**-24 * abs(want)


@pytest.mark.parametrize("name", NAMES)
def test_sums_do_not_depend_on_the_order(name):
    x = normal(1000, 3) * 2.0 ** normal(1000, 3, seed=1, scale=6)
    mixed = np.random.default_rng(2).permutation(x)
    assert same(
        run(lambda x, xp: sums.total(x, 0, xp=xp), mixed, name=name),
        run(lambda x, xp: sums.total(x, 0, xp=xp), x, name="numpy"),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axes", [-1, (0, 1), (0, 2)])
def test_sums_keep_nan_where_it_is(axes, name):
    x = normal(3, 4, 5)
    x[1, 2, 3] = np.nan
    got = run(lambda x, xp: sums.total(x, axes, xp=xp), x, name=name)
    assert (np.isnan(got) == np.isnan(x.sum(axes))).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_sum_of_nothing_is_zero(name):
    got = run(lambda x, xp: sums.total(x, 0, xp=xp), np.zeros((0, 3), np.float32), name=name)
    assert same(got, np.zeros(3, np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_scattered_as_their_sum_in_any_order(name):
    index = np.random.default_rng(0).integers(0, 7, 50).astype(np.int32)
    values = normal(50, 4)
    order = np.random.default_rng(1).permutation(50)
    call = lambda i, v, xp: sums.scatter_add(i, v, 7, xp=xp)  # noqa: E731
    assert same(
        run(call, index[order], values[order], name=name), run(call, index, values, name="numpy")
    )


@pytest.mark.parametrize(("engine", "name"), crossed(ENGINES, NAMES))
def test_every_engine_passes_its_self_test_here(engine, name):
    xp = namespace(name)
    import jax

    with jax.enable_x64(True):
        like = array(np.zeros(1, np.float32), xp)
        assert engines.self_test(Precision(engine=engine), like, xp=xp)


class Broken:
    """NumPy whose int8 products saturate and whose float32 ones lose their last bit."""

    def __getattr__(self, name):
        return getattr(np, name)

    def __init__(self, lossy):
        self.__name__, self.lossy = "numpy", lossy

    def matmul(self, a, b, **options):
        out = np.matmul(a, b, **options)
        return out * out.dtype.type(3) if out.dtype in self.lossy else out


def test_an_engine_that_fails_its_test_is_replaced_with_a_warning():
    broken = Broken([np.float64])
    with pytest.warns(UserWarning, match="'f64' fails its self-test here; 'int8' takes its place"):
        found = engines.choose(Precision(), np.zeros(1, np.float32), xp=broken)
    assert found == Precision(engine="int8")


def test_it_is_an_error_where_no_engine_is_exact():
    broken = Broken([np.float64, np.int32, np.float32])
    with pytest.raises(RuntimeError, match="no engine from 'f64' on is exact"):
        engines.choose(Precision(), np.zeros(1, np.float32), xp=broken)


@pytest.mark.parametrize("options", [{"bits": 7}, {"bits": 24}, {"engine": "f32"}])
def test_a_precision_that_there_is_not_is_an_error(options):
    with pytest.raises(ValueError, match=r"must be .*, got .*; use"):
        Precision(**options)


def test_products_of_arrays_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"matmul needs \[..., M, K\]"):
        sums.matmul(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32), xp=np)


def test_a_row_does_not_depend_on_what_else_is_in_the_batch():
    a, b = normal(9, 70), normal(70, 5, seed=1)
    assert same(product(a[3:4], b, "numpy"), product(a, b, "numpy")[3:4])
