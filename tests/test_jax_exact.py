"""Exact layers in JAX: the bits of NumPy forward and backward, under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")  # which the cases are compared with elsewhere

import usual
from cruxy_exact.engines import ENGINES
from cruxy_optax import exact
from exact_arrays import normal, run, same
from relatives import relatives
from test_exact_layers import CASES, WITH_PRODUCTS, inputs, pair

FUNCTIONS = {
    "gelu_exact": lambda x: exact.gelu(x, approximate=False),
    "cross_entropy": exact.softmax_cross_entropy_with_integer_labels,
}


def in_jax(case, transform=lambda f: f):
    """The output and the gradients by JAX's differentiation."""
    name = case.partition("-")[0]
    function = FUNCTIONS.get(name) or getattr(exact, name)
    _, rest, options, _ = CASES[case]
    call = transform(lambda *arrays: function(*arrays, *rest, **options))

    def both(*arrays):
        y, pull = jax.vjp(call, *arrays)
        return y, *pull(y * 0.25)

    assert not jax.config.jax_enable_x64
    return [np.asarray(x) for x in usual.jit(both)(*inputs(case))]


def in_numpy(case):
    forward, backward = pair(case)
    _, rest, options, _ = CASES[case]

    def call(*arrays, xp):
        y, kept = forward(*arrays, *rest, xp=xp, **options)
        return (y, *backward(kept, y * np.float32(0.25), xp=xp))

    return run(call, *inputs(case), name="numpy")


@pytest.mark.parametrize(
    "case",
    relatives(CASES, CASES.keys() - {"linear-no-bias", "attention-grouped", "attention-masked"}),
)
def test_a_function_has_numpys_bits_forward_and_backward(case):
    pairs = zip(in_jax(case), in_numpy(case), strict=True)
    assert [same(a, b) for a, b in pairs] == [True] * (1 + len(CASES[case][0]))


@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize("case", ["linear", pytest.param("attention", marks=pytest.mark.slow)])
def test_engines_have_the_same_bits(case, engine):
    options = CASES[case][2]
    assert case in WITH_PRODUCTS
    function = getattr(exact, case)
    calls = [
        usual.jit(lambda *a, p=p: function(*a, precision=p, **options))(*inputs(case))
        for p in (exact.Precision(), exact.Precision(engine=engine))
    ]
    assert same(*calls)


X, W = normal(3, 4, 5), normal(5, 5, seed=1)


def squared(x, w):
    return exact.sum(exact.gelu(exact.linear(x, w)))


GRADIENT = usual.jit(jax.grad(squared, argnums=1))


def test_results_are_float32_and_the_program_stays_so():
    assert (GRADIENT(X[0], W).dtype, jnp.arange(3).dtype, jnp.ones(1).dtype) == (
        jnp.float32, jnp.int32, jnp.float32,
    )  # fmt: skip


@pytest.mark.slow
def test_compiled_and_not_have_the_same_bits():
    with jax.disable_jit():
        eager = jax.grad(squared, argnums=1)(X[0], W)
    assert same(eager, GRADIENT(X[0], W))


def test_gradients_of_samples_by_vmap_are_those_of_each_alone():
    mapped = usual.jit(jax.vmap(jax.grad(squared, argnums=1), (0, None)))(X, W)
    assert same(mapped, np.stack([GRADIENT(x, W) for x in X]))


def test_checkpoint_changes_no_bit():
    again = usual.jit(jax.grad(jax.checkpoint(squared), argnums=1))(X[0], W)
    assert same(again, GRADIENT(X[0], W))


def test_layers_in_a_scan_have_the_bits_of_layers_in_a_row():
    weights = np.stack([W, W[::-1]])

    def scanned(weights):
        layer = lambda h, w: (exact.gelu(exact.linear(h, w)), None)  # noqa: E731
        return exact.sum(jax.lax.scan(layer, X[0], weights)[0])

    def in_a_row(weights):
        h = X[0]
        for i in range(2):
            h = exact.gelu(exact.linear(h, weights[i]))
        return exact.sum(h)

    assert same(*(usual.jit(jax.grad(f))(weights) for f in (scanned, in_a_row)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_not_finite_stays_in_its_row(bad, engine):
    x = X[0].copy()
    x[1, 2] = bad
    precision = exact.Precision(engine=engine)
    good, spoilt = (exact.linear(a, W, precision=precision) for a in (X[0], x))
    assert np.isnan(spoilt[1]).all()
    assert same(np.delete(spoilt, 1, 0), np.delete(good, 1, 0))


def test_a_row_does_not_depend_on_its_batch():
    block = lambda x: exact.gelu(exact.rms_norm(exact.linear(x, W), W[0]))  # noqa: E731
    whole = exact.gelu(block(np.concatenate([X[0], 1e4 * X[1], X[2]])))
    alone = exact.gelu(block(X[0, 2:3]))
    assert same(whole[2:3], alone)


def test_a_mask_is_the_same_for_shards_and_the_whole():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.NamedSharding(mesh, jax.P("d"))
    drop = usual.jit(lambda x: exact.dropout(x, exact.dropout_key(3, 1), 0.5))
    x = normal(16, 8)
    assert same(drop(jax.device_put(x, spread)), drop(x))


def test_meshes_of_explicit_axes_have_the_same_bits():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = normal(8, 5)
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P("d")))
        got = usual.jit(exact.linear)(spread, W, W[0])
    assert same(got, exact.linear(x, W, W[0]))


def test_copies_of_a_fork_have_their_gradients_added_exactly():
    scales = (1e8, 1.0, -1e8)

    def loss(x, order):
        parts = [exact.scale(c, scales[i]) for c, i in zip(exact.fork(x, 3), order, strict=True)]
        return exact.sum(exact.add(exact.add(parts[0], parts[1]), parts[2]))

    grads = [jax.grad(loss)(jnp.ones(2), order) for order in ((0, 1, 2), (2, 0, 1))]
    assert [g.tolist() for g in grads] == [[1.0, 1.0]] * 2


def test_a_mean_is_the_sum_times_a_reciprocal():
    x = normal(7)
    assert same(exact.mean(x), exact.scale(exact.sum(x), 1 / 7))


def test_patches_are_a_convolution_whose_stride_is_its_kernel():
    x, w = normal(2, 6, 4, 3), normal(3, 2, 3, 5)
    rows = exact.convolution(x, w, stride=(3, 2)).reshape(2, 4, 5)
    assert same(exact.patch_embedding(x, w), rows)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: exact.linear(X.astype(np.float16), W), TypeError, "got float16"),
        (lambda: exact.linear(X, W, precision="highest"), TypeError, r"exact\.Precision"),
        (lambda: exact.add(X, W), ValueError, "one shape"),
        (lambda: exact.fork(X, 1), ValueError, "at least 2, got 1"),
        (lambda: exact.dropout(X, exact.dropout_key(0, 0), 1.0), ValueError, "rate must be in"),
        (lambda: exact.dropout(X, 1.0), TypeError, "dropout_key"),
        (lambda: exact.embed(W, X), TypeError, "whole numbers, got float32"),
        (lambda: exact.mean(np.zeros(0, np.float32)), ValueError, "at least one number"),
        (lambda: exact.attention(X, X, X, X), TypeError, "mask must be boolean"),
        (lambda: exact.fused_attention(X, 2), ValueError, "3 \\* heads \\* d, got 5"),
        (lambda: exact.patch_embedding(np.ones((1, 5, 4, 3), np.float32),
                                       np.ones((2, 2, 3, 1), np.float32)),
         ValueError, "fill the image"),
    ],
)  # fmt: skip
def test_bad_input_is_an_error(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_second_derivative_is_refused(compiled):
    x = jnp.linspace(-1.0, 1.0, 6)

    def penalty(x):
        return jnp.sum(jax.grad(lambda x: exact.sum(exact.gelu(x)))(x) ** 2)

    derivative = jax.grad(penalty)
    with pytest.raises(TypeError, match="must not be differentiated twice"):
        (jax.jit(derivative) if compiled else derivative)(x)
    assert jnp.isfinite(penalty(x))


@pytest.mark.parametrize("label", [-100, -1, 3])
def test_a_label_out_of_range_makes_its_loss_nan(label):
    logits = jnp.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    losses = exact.softmax_cross_entropy_with_integer_labels(logits, jnp.array([2, label]))
    assert jnp.isnan(losses).tolist() == [False, True]
