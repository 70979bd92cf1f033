"""A released backward pass trains like an ordinary step and keeps one layer's gradient alone."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cruxy_optax
from cruxy_control import Meta3
from cruxy_control.controls import clip_scale, neutral
from cruxy_control.filters import select
from cruxy_optax import LayerStack, release_gradients
from cruxy_optax._sensors.measure import raw_sums, signals_of
from cruxy_optax._stabilize import loop_of
from jax_versions import enable_x64
from low_bit import coded
from optimizers import assert_same
from relatives import crossed, relatives

LAYERS, WIDTH, STEPS = 4, 6, 50


def embed_fn(embed, batch):
    return batch @ embed


def layer_fn(layer, x, batch):
    # The second term is 0, and where `fragile` is 0 its gradient is 0 * inf, which is NaN.
    return x + jnp.tanh(x @ layer["w"] + layer["b"]) + 0.0 * jnp.sqrt(layer["fragile"])


def loss_fn(head, embed, x, batch):
    """Reads the embedding a second time, as tied weights do."""
    return jnp.mean((x @ embed.T - jnp.roll(batch, 1, axis=-1)) ** 2) + jnp.mean((x @ head) ** 2)


def whole_loss(params, batch):
    x = embed_fn(params.embed, batch)
    for i in range(LAYERS):
        x = layer_fn(jax.tree.map(lambda leaf, i=i: leaf[i], params.layers), x, batch)
    return loss_fn(params.head, params.embed, x, batch)


def model(dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return jnp.asarray(0.3 * rng.normal(size=shape), dtype)

    layers = {
        "w": leaf(LAYERS, WIDTH, WIDTH),
        "b": leaf(LAYERS, WIDTH),
        "fragile": jnp.ones((LAYERS, 1), dtype),
    }
    return LayerStack(leaf(3, WIDTH), layers, leaf(WIDTH, 2))


def batches(dtype=jnp.float32, steps=STEPS):
    return jnp.asarray(np.random.default_rng(1).normal(size=(steps, 8, 3)), dtype)


def released(tx):
    return release_gradients(tx, embed_fn, layer_fn, loss_fn)


def train_released(tx, params, stacked):
    pair = released(tx)
    step = jax.jit(pair.step)
    state, losses = pair.init(params), []
    for batch in stacked:
        params, state, loss = step(params, state, batch)
        losses.append(loss)
    return params, state, jnp.stack(losses)


PLAIN = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "nesterov": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "rmsprop, a schedule": lambda: optax.rmsprop(optax.linear_schedule(1e-2, 1e-3, 50)),
    "clipped by tensor": lambda: optax.chain(optax.clip(0.05), optax.adam(1e-2)),
    "masked by a function": lambda: optax.chain(
        optax.scale_by_adam(),
        optax.masked(optax.add_decayed_weights(0.1), lambda p: jax.tree.map(lambda x: True, p)),
        optax.scale(-1e-2),
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_without_a_controller_it_equals_the_ordinary_step(name):
    tx = PLAIN[name]()
    with enable_x64(True):
        params, stacked = model(jnp.float64), batches(jnp.float64)

        @jax.jit
        def step(params, state, batch):
            loss, grads = jax.value_and_grad(whole_loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        want, state = params, tx.init(params)
        for batch in stacked:
            want, state, _ = step(want, state, batch)
        got, _, _ = train_released(tx, params, stacked)
        # In float64 rounding stays below 1e-12 over 50 steps; what is computed differently does
        # not: a gradient of 1e-6 elsewhere shows at 1e-8 after one step.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), got, want)


def reference(tx, params, stacked):
    """The documented step with a whole gradient, a Python loop and the law from outside."""
    inner, law, *_ = loop_of(tx)
    parts = [params.embed, params.head]
    parts += [jax.tree.map(lambda leaf, i=i: leaf[i], params.layers) for i in range(LAYERS)]
    states = [inner.init(part) for part in parts]
    law_state = law.init(jnp.float32(0.0), xp=jnp)
    held = neutral(jnp.bool_(True), xp=jnp)

    @jax.jit
    def step(parts, states, law_state, held, batch):
        def rebuilt(parts):
            layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts[2:])
            return LayerStack(parts[0], layers, parts[1])

        loss, grads = jax.value_and_grad(lambda parts: whole_loss(rebuilt(parts), batch))(parts)
        new_parts, new_states = [], []
        for part, state, grad in zip(parts, states, grads, strict=True):
            norm = optax.tree.norm(grad).astype(jnp.float32)
            scale = clip_scale(held.clip_threshold, norm, xp=jnp)
            updates, state = inner.update(
                grad, state, part, controls=held._replace(clip_scale=scale), value=loss
            )
            new_parts.append(optax.apply_updates(part, updates))
            new_states.append(state)
        signals = signals_of(raw_sums(grads, law.gamma), loss.astype(jnp.float32), law.gamma)
        law_state, ordered = law.step(law_state, signals, xp=jnp)
        return new_parts, new_states, law_state, select(ordered.ok, ordered, held, xp=jnp), loss

    losses = []
    for batch in stacked:
        parts, states, law_state, held, loss = step(parts, states, law_state, held, batch)
        losses.append(loss)
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts[2:])
    return LayerStack(parts[0], layers, parts[1]), held, jnp.stack(losses)


CONTROLLED = {
    "meta3": lambda: cruxy_optax.meta3(1e-2, law=Meta3(clip_threshold=0.05)),
    "stability_v2": lambda: cruxy_optax.stability_v2(optax.linear_schedule(1e-2, 1e-3, 50)),
    # Lion's sign turns a rounding into a whole step where a momentum is near 0; in float64 none is.
    "meta_lion": lambda: cruxy_optax.meta_lion(1e-3),
}


@pytest.mark.parametrize("name", relatives(CONTROLLED, CONTROLLED.keys() - {"stability_v2"}))
def test_with_a_controller_what_it_orders_comes_one_step_later_and_nothing_else_differs(name):
    tx = CONTROLLED[name]()
    with enable_x64(True):
        params, stacked = model(jnp.float64), batches(jnp.float64)
        got, state, losses = train_released(tx, params, stacked)
        want, held, want_losses = reference(tx, params, stacked)
        # Controls are float32: a rounding of theirs, 1e-7, moves a parameter by that part of its
        # way, at most 50 steps of 1e-2.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-7), got, want)
        np.testing.assert_allclose(losses, want_losses, rtol=1e-6)
        for got_one, want_one in zip(state.controls, held, strict=True):
            if got_one is not None:  # what this law does not move is not kept
                np.testing.assert_allclose(got_one, want_one, rtol=1e-4, atol=1e-6)


def test_the_first_step_is_under_no_orders_and_the_second_under_those_of_the_first():
    tx = cruxy_optax.meta_lion(1e-2, weight_decay=0.0, law=Meta3(beta1_gain=0.0))
    params, stacked = model(), batches(steps=2)
    pair = released(tx)
    first, state, _ = pair.step(params, pair.init(params), stacked[0])
    second, _, _ = pair.step(first, state, stacked[1])
    step_sizes = [
        np.max(np.abs(np.asarray(b.layers["w"]) - np.asarray(a.layers["w"])))
        for a, b in ((params, first), (first, second))
    ]
    # A sign times the rate; the phase throttle of 0.75 acts from the second step on.
    np.testing.assert_allclose(step_sizes, [1e-2, 0.75e-2], rtol=1e-4)


def test_a_layer_without_a_finite_gradient_stays_as_it_was_and_others_move():
    tx = cruxy_optax.meta3(1e-2)
    pair = released(tx)
    step = jax.jit(pair.step)
    params = model()
    state = pair.init(params)
    params, state, _ = step(params, state, batches()[0])
    broken = params._replace(
        layers=params.layers | {"fragile": params.layers["fragile"].at[2].set(0.0)}
    )
    after, new_state, _ = step(broken, state, batches()[1])

    def layer(tree, i):
        return jax.tree.map(lambda leaf: leaf[i], tree)

    assert_same(layer(after.layers, 2), layer(broken.layers, 2))
    moments = (
        jax.tree.leaves(state.inner_state.layers),
        jax.tree.leaves(new_state.inner_state.layers),
    )
    kept = [bool(jnp.all(a[2] == b[2])) for a, b in zip(*moments, strict=True)]
    # All but the last step's betas and rate, which say that the layer was skipped.
    assert kept.count(False) <= 4
    assert all(
        bool(jnp.all(jnp.isfinite(leaf)))
        for leaf in jax.tree.leaves((after, new_state.inner_state))
    )
    for i in (0, 1, 3):
        assert bool(jnp.all(layer(after.layers, i)["w"] != layer(broken.layers, i)["w"]))
    assert bool(jnp.all(after.embed != broken.embed))
    assert_same(new_state.law_state, state.law_state)
    assert (int(new_state.skipped_total), int(new_state.step)) == (1, 1)

    repaired = after._replace(layers=after.layers | {"fragile": jnp.ones((LAYERS, 1))})
    final, new_state, _ = step(repaired, new_state, batches()[2])
    assert bool(jnp.all(final.layers["w"] != repaired.layers["w"]))
    assert (int(new_state.skipped_total), int(new_state.skipped_in_a_row)) == (1, 0)


@pytest.mark.parametrize("name", relatives(PLAIN | CONTROLLED, ["adamw", "meta3", "meta_lion"]))
def test_shapes_and_dtypes_stay_so_that_it_scans_and_donates(name):
    params, stacked = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model()), batches(steps=3)
    pair = released((PLAIN | CONTROLLED)[name]())

    def body(carry, batch):
        params, state, loss = pair.step(*carry, batch)
        return (params, state), loss

    carry = params, pair.init(params)
    run = jax.jit(lambda carry, stacked: jax.lax.scan(body, carry, stacked), donate_argnums=0)
    shapes = jax.eval_shape(lambda carry: carry, carry)
    carry, losses = run(carry, stacked.astype(jnp.bfloat16))
    assert jax.eval_shape(lambda carry: carry, carry) == shapes
    assert bool(jnp.all(jnp.isfinite(losses)))


def test_telemetry_reads_what_the_whole_pass_measured():
    params, stacked = model(), batches(steps=1)
    _, state, losses = train_released(cruxy_optax.meta3(1e-2), params, stacked)
    values = cruxy_optax.telemetry(state)
    grads = jax.grad(whole_loss)(params, stacked[0])
    np.testing.assert_allclose(values["grad_norm"], optax.tree.norm(grads), rtol=1e-6)
    np.testing.assert_allclose(values["loss"], losses[0])
    assert int(values["step"]) == 1


def test_telemetry_shows_one_number_for_all_layers():
    tx = cruxy_optax.meta3(1e-2)
    _, state, _ = train_released(tx, model(), batches(steps=1))
    values = cruxy_optax.telemetry(state)
    assert {np.shape(value) for value in values.values()} == {()}
    assert float(values["learning_rate.layers[4]"]) == pytest.approx(1e-2)


def test_a_head_without_parameters_is_an_empty_tuple():
    def loss(head, embed, x, batch):
        return jnp.mean(x**2)

    pair = release_gradients(cruxy_optax.meta3(1e-2), embed_fn, layer_fn, loss)
    params = model()._replace(head=())
    after, _, _ = jax.jit(pair.step)(params, pair.init(params), batches()[0])
    assert after.head == ()
    assert bool(jnp.all(after.embed != params.embed))


def equal_parts(shape, dtype, tx):
    """A model of equal parts with the same gradient, and its released step."""
    part = jnp.ones(shape, dtype)
    slope = jnp.linspace(0.1, 1.0, math.prod(shape)).reshape(shape)
    params = LayerStack(part, jnp.ones((LAYERS, *shape), dtype), part)

    def total(part):
        return jnp.sum(slope * part)

    pair = release_gradients(
        tx,
        lambda embed, batch: total(embed),
        lambda layer, x, batch: x + total(layer),
        lambda head, embed, x, batch: x + total(head),
    )
    grads = jax.tree.map(lambda p: jnp.broadcast_to(slope, p.shape).astype(dtype), params)
    return params, grads, pair


def assert_all_differ(parts):
    for a, b in itertools.combinations(parts, 2):
        assert np.any(np.asarray(a) != np.asarray(b))


def test_stochastic_rounding_is_that_of_the_ordinary_step_and_no_two_parts_round_alike():
    tx = cruxy_optax.round_updates(optax.sgd(1e-3), seed=3)
    params, grads, pair = equal_parts((32, 64), jnp.bfloat16, tx)
    state, want, want_state = pair.init(params), params, tx.init(params)
    for _ in range(3):
        params, state, _ = jax.jit(pair.step)(params, state, ())
        updates, want_state = tx.update(grads, want_state, want)
        want = optax.apply_updates(want, updates)
    assert_same(params, want)
    assert_all_differ([params.embed, *params.layers, params.head])


@pytest.mark.parametrize(("shape", "bits"), crossed([(64, 64), (4099,)], [8, 4]))
def test_no_two_parts_round_a_coded_state_alike(bits, shape):
    tx = cruxy_optax.quantize_state(optax.adam(1e-3), bits)
    params, _, pair = equal_parts(shape, jnp.float32, tx)
    _, state, _ = jax.jit(pair.step)(params, pair.init(params), ())
    embed, layers, head = (coded(part) for part in state)
    assert len(embed) == 2
    for name in embed:
        assert_all_differ([embed[name].codes, *layers[name].codes, head[name].codes])


def temporaries(tx, layers, width, *, release):
    """Bytes the compiled step needs beside arguments and results, and the bytes of one layer."""

    def one_layer(layer, x, batch):
        return x + jnp.tanh(x @ layer["up"]) @ layer["down"]

    def loss(head, embed, x, batch):
        return jnp.mean((x @ head) ** 2)

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    up, down = shape(layers, width, 4 * width), shape(layers, 4 * width, width)
    params = LayerStack(shape(4, width), {"up": up, "down": down}, shape(width, 4))
    batch = shape(8, 4)

    def ordinary(params, state, batch):
        def whole(params):
            x = embed_fn(params.embed, batch)
            body = jax.checkpoint(lambda x, layer: (one_layer(layer, x, batch), None))
            x, _ = jax.lax.scan(body, x, params.layers)
            return loss(params.head, params.embed, x, batch)

        value, grads = jax.value_and_grad(whole)(params)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state, value

    pair = release_gradients(tx, embed_fn, one_layer, loss)
    init, step = (pair.init, pair.step) if release else (tx.init, ordinary)
    state = jax.eval_shape(init, params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch)
    memory = cruxy_optax.estimate_memory(tx, params, train_step=lowered)
    assert memory.peak is not None
    return memory.peak - memory.parameters - memory.state, 32 * width * width


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: optax.adamw(1e-3), marks=pytest.mark.slow),
        lambda: cruxy_optax.meta3(1e-3),
    ],
)
def test_what_is_held_beside_parameters_and_state_does_not_grow_with_the_layers(make):
    few, layer = temporaries(make(), 4, 256, release=True)
    many, _ = temporaries(make(), 12, 256, release=True)
    # Eight more layers bring eight more inputs of (8, 256), and not one more gradient.
    assert many - few < 8 * (8 * 256 * 4) + 0.05 * layer
    # One gradient, and one layer's parameters and two moments in the making.
    assert many < 4.2 * layer
    ordinary, _ = temporaries(make(), 12, 256, release=False)
    assert ordinary > 12 * layer


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(), "must not accumulate"),
        (
            optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
            r"depends on the gradient of .* as well, as with optax.clip_by_global_norm; leave that",
        ),
        (
            cruxy_optax.stabilize(
                optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_learning_rate(1e-3))
            ),
            "must update each tensor from its own gradient",
        ),
        (optax.apply_if_finite(optax.adam(1e-3), 3), "must update each tensor from its own"),
        (optax.chain(cruxy_optax.meta3(1e-3), optax.clip(1.0)), "a controller must be outermost"),
    ],
)
def test_what_needs_the_whole_gradient_is_refused(tx, message):
    with pytest.raises(ValueError, match=message):
        released(tx).init(model())


@pytest.mark.parametrize(
    "tx",
    [
        optax.adaptive_grad_clip(0.1),
        optax.adafactor(1e-3, min_dim_size_to_factor=4),
        optax.lamb(1e-3),
        optax.inject_hyperparams(optax.adamw)(1e-3),
        optax.contrib.muon(1e-3),
        cruxy_optax.stability_v1(1e-3, centralize=True),
    ],
    ids=["adaptive_grad_clip", "adafactor", "lamb", "inject_hyperparams", "muon", "centralize"],
)
def test_what_treats_each_tensor_for_itself_is_accepted(tx):
    params = model()
    pair = released(tx)
    after, _, loss = jax.jit(pair.step)(params, pair.init(params), batches()[0])
    assert bool(jnp.isfinite(loss))
    assert bool(jnp.any(after.layers["w"] != params.layers["w"]))


def test_bad_arguments_say_what_to_do():
    with pytest.raises(TypeError, match=r"tx must be a gradient transformation, .*MultiSteps"):
        released(optax.MultiSteps(optax.adam(1e-3), 2))
    with pytest.raises(ValueError, match=r"axis_names must be empty .*, got \('data',\)"):
        released(cruxy_optax.meta3(1e-3, axis_names="data"))
    with pytest.raises(TypeError, match="params must be a LayerStack"):
        released(optax.adam(1e-3)).init({"w": jnp.ones(3)})
    uneven = model()._replace(layers={"w": jnp.ones((4, 2)), "b": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match=r"all equally many, got \[\(3,\), \(4,\)\]"):
        released(optax.adam(1e-3)).init(uneven)
