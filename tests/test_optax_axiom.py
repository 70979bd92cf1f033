"""AXIOM is Adafactor's direction under the controller, with next to no state on matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cruxy_optax
from cruxy_control import Meta3
from cruxy_optax import axiom, estimate_memory
from cruxy_optax._memory.estimate import tree_bytes
from optimizers import assert_close, assert_same, at, gradients, train, tree

PASSIVE = Meta3(
    phase_strength=0.0,
    rate_gain=0.0,
    beta1_gain=0.0,
    beta2_phase_strength=0.0,
    beta2_gain=0.0,
    clip_threshold=None,
)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def gpt_10m():
    """The 10.7M GPT of the examples: six layers of 384, a context of 256, 65 characters."""
    block = {
        "attention_in": shape(384, 1152),
        "attention_out": shape(384, 384),
        "mlp_in": shape(384, 1536),
        "mlp_out": shape(1536, 384),
        "norms": shape(2, 384),
    }
    blocks = {f"{i}": block for i in range(6)}
    return {"tokens": shape(65, 384), "positions": shape(256, 384), "norm": shape(384), **blocks}


def llama_1b(dtype=jnp.bfloat16):
    """TinyLlama's 1.1B: 22 layers of 2048 with 4 key and value heads, 32,000 tokens."""
    block = {
        "q": shape(2048, 2048, dtype=dtype),
        "k": shape(2048, 256, dtype=dtype),
        "v": shape(2048, 256, dtype=dtype),
        "o": shape(2048, 2048, dtype=dtype),
        "gate": shape(2048, 5632, dtype=dtype),
        "up": shape(2048, 5632, dtype=dtype),
        "down": shape(5632, 2048, dtype=dtype),
        "norms": shape(2, 2048, dtype=dtype),
    }
    ends = {name: shape(32000, 2048, dtype=dtype) for name in ("tokens", "head")}
    return {**ends, "norm": shape(2048, dtype=dtype), **{f"{i}": block for i in range(22)}}


def large_matrices(params):
    """Those with both sides of 384 or more, and how many parameters they have."""
    kept = [p for p in jax.tree.leaves(params) if p.ndim == 2 and min(p.shape) >= 384]
    return kept, sum(p.size for p in kept)


@pytest.mark.parametrize(("model", "count"), [(gpt_10m, 10.7e6), (llama_1b, 1.1e9)])
def test_large_matrices_keep_under_three_hundredths_of_a_byte_a_parameter(model, count):
    params = model()
    memory = estimate_memory(axiom(), params)
    assert memory.parameter_count == pytest.approx(count, rel=0.01)
    matrices, parameters = large_matrices(params)
    assert tree_bytes(jax.eval_shape(axiom().init, matrices)) <= 0.03 * parameters
    # And the rest does not spoil it: embeddings and thin matrices are factored too.
    assert memory.state <= 0.03 * memory.parameter_count


@pytest.mark.parametrize("model", [gpt_10m, llama_1b])
def test_a_momentum_of_four_bits_adds_about_half_a_byte(model):
    params = model()
    memory = estimate_memory(axiom(b1=0.9), params)
    assert memory.state <= 0.54 * memory.parameter_count


@pytest.mark.parametrize("relative_step", [False, True])
def test_under_a_passive_law_it_is_adafactor(relative_step):
    ours = axiom(
        1e-2,
        weight_decay=0.0,
        law=PASSIVE,
        relative_step=relative_step,
        min_dim_size_to_factor=4,
    )
    theirs = optax.adafactor(
        1e-2, min_dim_size_to_factor=4, multiply_by_parameter_scale=relative_step
    )
    stacked, losses = gradients(30)
    got, _ = train(ours, tree(), stacked, losses)
    want, state = tree(), theirs.init(tree())
    for t in range(30):
        updates, state = theirs.update(at(stacked, t), state, want)
        want = optax.apply_updates(want, updates)
    # The decay 1 - t^-0.8 is near 1 and rounds to one float32 in either form.
    assert_close(got, want, ulps=256)


def reference(grads, b1, boost, floor, rate):
    """The direction of one vector in float64, from the formulas: its update at every step."""
    v, m, updates = np.zeros(grads.shape[1]), np.zeros(grads.shape[1]), []
    for t, g in enumerate(grads.astype(np.float64), start=1):
        beta = 1.0 - t**-0.8
        v = beta * v + (1.0 - beta) * (g**2 + 1e-30)
        u = g / np.sqrt(v)
        u /= max(1.0, np.sqrt(np.mean(u**2)))
        m = b1 * m + (1.0 - b1) * u
        hat = m / (1.0 - b1**t)
        factor = 1.0 + (boost - 1.0) * np.minimum(1.0, np.abs(hat))
        if floor:
            factor = factor * min(1.0, np.mean(hat**2) / floor)
        updates.append(-rate * hat * factor)
    return np.array(updates)


@pytest.mark.parametrize(("boost", "floor"), [(1.0, 0.0), (1.5, 0.0), (1.0, 0.6), (1.3, 0.6)])
def test_momentum_boost_and_floor_are_the_formulas(boost, floor):
    grads = np.random.default_rng(0).normal(size=(20, 12)).astype(np.float32) + 0.5
    tx = axiom(
        1e-2,
        b1=0.9,
        weight_decay=0.0,
        law=PASSIVE,
        momentum_bits=32,
        streak_boost=boost,
        snr_floor=floor,
    )
    params = jnp.zeros(12)
    state, updates = tx.init(params), []
    for g in grads:
        update, state = tx.update(jnp.asarray(g), state, params)
        updates.append(update)
    want = reference(grads, 0.9, boost, floor, 1e-2)
    np.testing.assert_allclose(np.stack(updates), want, rtol=1e-4, atol=1e-7)


def test_a_persistent_sign_is_boosted_in_full_and_noise_is_damped():
    noise = jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], size=(200, 64)), jnp.float32)
    steady = jnp.ones((200, 64))

    def last(grads, **options):
        tx = axiom(1.0, b1=0.9, weight_decay=0.0, law=PASSIVE, momentum_bits=32, **options)
        params = jnp.zeros(64)
        state = tx.init(params)
        update, step = params, jax.jit(tx.update)
        for g in grads:
            update, state = step(g, state, params)
        return np.sqrt(np.mean(np.square(update)))

    np.testing.assert_allclose(last(steady, streak_boost=1.5), 1.5, rtol=1e-3)
    np.testing.assert_allclose(last(steady, snr_floor=0.5), 1.0, rtol=1e-3)
    # The mean of 64 squares around (1 - b1) / (1 + b1) = 0.053, which 0.5 is 9.5 times of.
    assert last(noise, snr_floor=0.5) < 0.2 * last(noise)


def test_the_state_is_float32_whatever_the_parameters_and_keeps_moving():
    params = jnp.ones((64, 64), jnp.bfloat16)
    tx = axiom(1e-3)
    update = jax.jit(tx.update)
    state = tx.init(params)
    rows = []
    for size in [1.0] * 30 + [1.01] * 30:
        _, state = update(jnp.full((64, 64), size, jnp.bfloat16), state, params)
        rows.append(state.inner_state[1].v_row[0])
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(x.dtype == jnp.float32 for x in floats)
    # At decay 0.96 and on, a bfloat16 mean of 1 would not have moved towards 1.01 squared.
    assert rows[-1] > 1.005


@pytest.mark.parametrize("options", [{}, {"b1": 0.9}], ids=["plain", "momentum"])
def test_a_step_that_is_not_finite_changes_two_counters(options):
    params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
    tx = axiom(1e-2, **options)
    _, state = tx.update(params, tx.init(params), params)
    updates, after = tx.update(params | {"b": jnp.full(64, jnp.nan)}, state, params)
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
    assert_same(after.inner_state[1:-2], state.inner_state[1:-2])
    assert int(after.skipped_total) == 1


@pytest.mark.parametrize("options", [{}, {"b1": 0.9, "streak_boost": 1.5, "snr_floor": 0.1}])
def test_it_scans_donates_and_keeps_its_dtypes(options):
    params = tree(jnp.bfloat16) | {"m": jnp.ones((64, 64), jnp.bfloat16)}
    tx = axiom(1e-2, **options)

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params, value=1.0)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(body, carry, length=4)[0], donate_argnums=0)
    carry = params, tx.init(params)
    shapes = jax.eval_shape(lambda carry: carry, carry)
    carry = run(carry)
    assert jax.eval_shape(lambda carry: carry, carry) == shapes
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(carry[0]))


def test_its_gradients_can_be_released():
    params = cruxy_optax.LayerStack(
        jnp.ones((4, 64)), jnp.stack([0.1 * jnp.eye(64)] * 3), jnp.ones((64, 2))
    )
    pair = cruxy_optax.release_gradients(
        axiom(1e-3, b1=0.9),
        lambda embed, batch: batch @ embed,
        lambda layer, x, batch: x + jnp.tanh(x @ layer),
        lambda head, embed, x, batch: jnp.mean((x @ head) ** 2),
    )
    after, state, _ = jax.jit(pair.step)(params, pair.init(params), jnp.ones((2, 4)))
    assert all(bool(jnp.all(a != b)) for a, b in zip(after, params, strict=True))
    assert int(state.step) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streak_boost": 1.5}, r"streak_boost needs a momentum .* streak_boost=1.5 without b1"),
        ({"snr_floor": 0.1}, r"snr_floor needs a momentum .* give b1=0.9, or snr_floor=0"),
        ({"b1": 0.9, "streak_boost": 1.6}, r"streak_boost must be in \[1, 1.5\], got 1.6"),
        ({"b1": 0.9, "snr_floor": 1.0}, r"snr_floor must be in \[0, 1\), got 1.0"),
        ({"b1": 1.0}, r"b1 must be in \(0, 1\), got 1.0; 0.9 is a usual value, None is no"),
        ({"b1": 0.9, "momentum_bits": 3}, r"momentum_bits must be 32, 16, 8 or 4, got 3"),
        ({"clip_rms": 0.0}, r"clip_rms must be in \(0, infinity\), got 0.0"),
        ({"decay_rate": 0.0}, r"decay_rate must be in \(0, 1\], got 0.0"),
        ({"min_dim_size_to_factor": 1}, r"min_dim_size_to_factor must be a whole number >= 2"),
        ({"learning_rate": -1.0}, r"learning_rate must be in \[0, infinity\), got -1.0"),
    ],
)
def test_a_bad_argument_is_refused_with_a_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        axiom(**options)
