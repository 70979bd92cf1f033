"""Inputs of layers in 8 and 4 bits: memory, gradients without a bias, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cruxy_optax
from cruxy_exact import AffineCode
from cruxy_optax import compressed_checkpoint
from cruxy_optax._memory.activations import decode, encode

every_width = pytest.mark.parametrize("bits", [8, 4])
LAYERS, WIDTH, ROWS = 6, 64, 1024


def layer(params, x):
    return x + jax.nn.gelu(x @ params["a"]) @ params["b"]


def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "a": jax.random.normal(keys[0], (LAYERS, WIDTH, 4 * WIDTH)) * 0.05,
        "b": jax.random.normal(keys[1], (LAYERS, 4 * WIDTH, WIDTH)) * 0.05,
    }
    return params, jax.random.normal(keys[2], (ROWS, WIDTH))


def loss_with(layer):
    def loss(params, x):
        return jnp.mean(jax.lax.scan(lambda x, p: (layer(p, x), None), x, params)[0] ** 2)

    return loss


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def compiled(layer):
    params, x = problem()
    return jax.jit(jax.value_and_grad(loss_with(layer), (0, 1))).lower(params, x).compile()


class TestMemory:
    """By XLA's own account of what a compiled step needs beside inputs and outputs."""

    def test_a_step_needs_less_than_one_with_jax_checkpoint(self):
        layers = [layer, jax.checkpoint(layer), compressed_checkpoint(layer)]
        layers += [compressed_checkpoint(layer, 4)]
        plain, remat, eight, four = (
            compiled(each).memory_analysis().temp_size_in_bytes for each in layers
        )
        stack = LAYERS * ROWS * WIDTH * 4  # the input of every layer
        assert plain > 2 * remat
        assert remat - eight > 0.6 * stack
        assert eight - four > 0.08 * stack

    def test_the_stack_of_a_scan_is_of_bytes(self):
        text = compiled(compressed_checkpoint(layer)).as_text()
        assert f"u8[{LAYERS},{ROWS * WIDTH // 256},256]" in text
        assert f"f32[{LAYERS},{ROWS},{WIDTH}]" not in text

    def test_of_released_gradients_too(self):
        sizes = []
        for residual_bits in (None, 8):
            params, step = released(residual_bits)
            state, batch = step.init(params), jnp.ones((ROWS, WIDTH))
            lowered = jax.jit(step.step, donate_argnums=(0, 1)).lower(params, state, batch)
            sizes.append(lowered.compile().memory_analysis().temp_size_in_bytes)
        stack = LAYERS * ROWS * WIDTH * 4
        assert sizes[0] - sizes[1] > 0.6 * stack


def released(residual_bits):
    params, _ = problem()
    whole = cruxy_optax.LayerStack(embed=jnp.eye(WIDTH), layers=params, head=jnp.ones(WIDTH))
    step = cruxy_optax.release_gradients(
        optax.sgd(0.1),
        lambda embed, batch: batch @ embed,
        lambda params, x, batch: layer(params, x),
        lambda head, embed, x, batch: jnp.mean((x @ head) ** 2),
        residual_bits=residual_bits,
    )
    return whole, step


class TestGradients:
    """The forward pass is untouched; gradients are right, and unbiased where that can be."""

    @pytest.mark.parametrize(("bits", "allowed"), [(8, 0.01), (4, 0.15)])
    def test_the_loss_is_the_same_and_gradients_are_near(self, bits, allowed):
        params, x = problem()
        want_loss, want = compiled(layer)(params, x)
        loss, got = compiled(compressed_checkpoint(layer, bits))(params, x)
        assert loss == want_loss
        error = np.linalg.norm(flat(got) - flat(want))
        assert 0 < error < allowed * np.linalg.norm(flat(want))

    @every_width
    def test_the_mean_of_64_gradients_of_a_linear_layer_is_the_exact_one(self, bits):
        x = jnp.abs(jax.random.normal(jax.random.key(1), (256, 32)))
        y = jax.random.normal(jax.random.key(2), (256, 16))
        f = compressed_checkpoint(lambda w, x: x @ w, bits)

        def gradient(draw):
            # Eight rows whose output counts nothing: a group of its own, and other random bits.
            more = jnp.concatenate([x, jnp.full((8, 32), 1.0 + draw)])
            return jax.grad(lambda w: jnp.mean(f(w, more)[:256] * y))(jnp.zeros((32, 16)))

        want = flat(jax.grad(lambda w: jnp.mean(x @ w * y))(jnp.zeros((32, 16))))
        draws = np.asarray(jax.lax.map(gradient, jnp.arange(64.0)), np.float64).reshape(64, -1)
        z = np.abs(draws.mean(0) - want) / (draws.std(0, ddof=1) / 8.0)
        # Student's t of 63 degrees: 0.4 % lie beyond 3, one in 10^7 beyond 6. A row of w shares
        # the noise of one column of x.
        assert (z > 3.0).mean() < 0.02
        assert (z**2).mean() < 1.5
        assert z.max() < 6.0

    @pytest.mark.parametrize(("bits", "allowed"), [(8, 0.01), (4, 0.15)])
    def test_released_gradients_from_coded_inputs_are_near(self, bits, allowed):
        batch = jax.random.normal(jax.random.key(5), (ROWS, WIDTH))
        moved = []
        for residual_bits in (None, bits):
            params, step = released(residual_bits)
            after, _, loss = jax.jit(step.step)(params, step.init(params), batch)
            moved.append((flat(after) - flat(params), loss))
        (want, want_loss), (got, loss) = moved
        assert loss == want_loss
        error = np.linalg.norm(got - want)
        assert 0 < error < allowed * np.linalg.norm(want)

    def test_integers_small_arrays_and_exact_arguments_are_kept_as_they_are(self):
        table = jax.random.normal(jax.random.key(3), (50, 128))
        ids, shift = jnp.arange(50) % 7, jnp.linspace(0.0, 1.0, 128)

        def f(table, ids, shift):
            return jnp.tanh(table[ids] * shift).sum()

        want = jax.grad(f, (0, 2))(table, ids, shift)
        got = jax.grad(compressed_checkpoint(f, min_elements=512), (0, 2))(table, ids, shift)
        np.testing.assert_array_equal(flat(got), flat(want))

    def test_what_is_not_finite_stays_visible(self):
        x = jnp.ones((64, 128)).at[3, 5].set(jnp.nan)
        f = compressed_checkpoint(lambda w, x: x @ w)
        assert jnp.isnan(jax.grad(lambda w: f(w, x).sum())(jnp.ones((128, 4)))).any()

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_comes_back_in_its_dtype(self, dtype):
        x = jnp.linspace(-1.0, 1.0, 8192, dtype=dtype)
        got = decode(encode(x, AffineCode(8), (0, 0)))
        assert got.dtype == dtype
        # A step of its group, and a rounding to its own dtype.
        assert jnp.abs(got.astype(jnp.float32) - x.astype(jnp.float32)).max() < 0.01

    def test_under_vmap_and_jit_it_is_the_same(self):
        x = jax.random.normal(jax.random.key(7), (3, 256, 32))
        w = jnp.ones((32, 8))
        f = compressed_checkpoint(lambda w, x: jnp.sin(x @ w))
        grad = jax.grad(lambda x: f(w, x).sum())
        alone = jnp.stack([grad(each) for each in x])
        np.testing.assert_allclose(jax.jit(jax.vmap(grad))(x), alone, rtol=1e-5, atol=1e-5)


class TestRefused:
    """Errors say the rule."""

    def test_a_second_derivative(self):
        w, x = jnp.ones((4, 4)), jnp.ones((2048, 4))

        def loss(w, x):
            return jnp.sum(compressed_checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x))

        with pytest.raises(TypeError, match="must not be differentiated twice"):
            jax.grad(lambda x: jax.grad(loss)(w, x).sum())(x)

    def test_other_bits(self):
        with pytest.raises(ValueError, match="bits must be 8 or 4, got 2"):
            compressed_checkpoint(layer, 2)
        with pytest.raises(ValueError, match="bits must be 8 or 4, got 16"):
            released(16)
        with pytest.raises(ValueError, match="min_elements must be"):
            compressed_checkpoint(layer, min_elements=0)


@every_width
def test_codes_in_jax_and_in_pytorch_are_the_same(bits):
    torch = pytest.importorskip("torch")
    from cruxy_torch._memory import flat_codes

    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    ours = encode(jnp.asarray(x), AffineCode(bits), None)
    theirs = flat_codes.encode(torch.from_numpy(x), AffineCode(bits), None)
    np.testing.assert_array_equal(np.asarray(ours.codes), theirs.codes.numpy())
    decoded = flat_codes.decode(theirs)[:1000].numpy()
    np.testing.assert_array_equal(np.asarray(decode(ours)), decoded)
