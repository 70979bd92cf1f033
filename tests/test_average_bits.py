"""An average in 16 and 8 bits is that in float32, in fewer bytes, wherever it is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cruxy_optax
from cruxy_control import Meta3
from cruxy_optax import (
    LayerStack,
    average_iterates,
    averaged_params,
    release_gradients,
    self_driving,
    stabilize,
)
from jax_versions import set_mesh
from relatives import crossed, relatives
from test_optax_quantize_sharding import moved_between_devices

ERROR = {32: 3e-3, 16: 0.005, 8: 0.16}
"""How far an average may be from the exact one, in terms of how far that is from the parameters.

The variance that rounding gathers is `g |d| / 2` (`NearCode`) of a step `g` that is at most an
eighth of the root mean square of `d`, in 16 bits a 256th of that; in float32 what is left is the
parameters' own rounding.
"""
either = pytest.mark.parametrize("bits", [16, 8])


def wandering(tx, params, steps=200):
    """Parameters, state, and the exact average after steps of noise around 0."""
    exact = [np.asarray(p, np.float64) for p in jax.tree.leaves(params)]

    @jax.jit
    def step(params, state, key):
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        grads = [
            (1e-2 * p + 1e-3 * jax.random.normal(k, p.shape)).astype(p.dtype)
            for p, k in zip(leaves, keys, strict=True)
        ]
        updates, state = tx.update(treedef.unflatten(grads), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for t in range(steps):
        params, state = step(params, state, jax.random.key(t))
        weight = 17.0 / (t + 17.0)
        exact = [
            a + weight * (np.asarray(p, np.float64) - a)
            for a, p in zip(exact, jax.tree.leaves(params), strict=True)
        ]
    return params, state, exact


def errors(params, state, exact):
    """Of each leaf, the error of its average over the distance of that from the parameter."""
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    averages = jax.tree.leaves(averaged_params(state, wide))
    for a, p, wanted in zip(averages, jax.tree.leaves(wide), exact, strict=True):
        yield np.linalg.norm(np.asarray(a) - wanted) / np.linalg.norm(np.asarray(p) - wanted)


def tree(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"folded": (64, 64), "flat": (17, 301), "small": (7,)}
    return {n: jnp.asarray(0.1 * rng.normal(size=s), dtype) for n, s in shapes.items()}


@pytest.mark.parametrize(("bits", "dtype"), crossed([32, 16, 8], [jnp.float32, jnp.bfloat16]))
def test_average_is_that_of_the_parameters_as_they_really_are(bits, dtype):
    tx = optax.chain(optax.sgd(1.0), average_iterates(bits=bits))
    assert max(errors(*wandering(tx, tree(dtype)))) < ERROR[bits]


@either
def test_small_weights_late_in_a_run_are_not_lost(bits):
    """Parameters stand still: the average comes nearer by the share of the weight each step."""
    tx, steps, count = average_iterates(bits=bits), 2000, 100_000
    params, zeros = jnp.full((64, 64), 0.5), jnp.zeros((64, 64))
    _, state = tx.update(zeros + 0.01, tx.init(params), params)  # all weight on the first
    state = state._replace(count=jnp.asarray(count, jnp.int32))

    def step(state, _):
        return tx.update(zeros, state, params)[1], None

    state, _ = jax.lax.scan(step, state, length=steps)
    left = np.prod(1.0 - 17.0 / (np.arange(count, count + steps) + 17.0))
    distance = averaged_params(state, params) - params
    np.testing.assert_allclose(distance.mean(), 0.01 * left, rtol=0.02)


@either
def test_skipped_step_leaves_every_code_as_it_was(bits):
    tx = self_driving(average_bits=bits)
    params = tree()
    params, state, _ = wandering(tx, params, 5)
    _, after = tx.update(jax.tree.map(lambda p: p * jnp.nan, params), state, params)
    jax.tree.map(
        np.testing.assert_array_equal,
        cruxy_optax._tree.find(after, cruxy_optax._actuators.average.AverageIteratesState),
        cruxy_optax._tree.find(state, cruxy_optax._actuators.average.AverageIteratesState),
    )


@pytest.mark.parametrize("bits", relatives([16, 8], [8]))
def test_training_is_the_same_to_the_bit(bits):
    coded, exact = (wandering(self_driving(average_bits=b), tree(), 5)[0] for b in (bits, 32))
    jax.tree.map(np.testing.assert_array_equal, coded, exact)


@pytest.mark.parametrize(("bits", "size"), [(32, 12.0), (16, 10.008), (8, 9.008)])
def test_estimate_counts_the_bytes(bits, size):
    params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    memory = cruxy_optax.estimate_memory(params, self_driving(average_bits=bits))
    assert memory.state / memory.parameter_count == pytest.approx(size, abs=1e-3)


@either
def test_averages_are_found_in_an_nnx_optimizer(bits):
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, self_driving(average_bits=bits), wrt=nnx.Param)
    for _ in range(2):
        optimizer.update(model, nnx.state(model, nnx.Param))
    now = nnx.state(model, nnx.Param)
    average = averaged_params(optimizer.opt_state, now)
    jax.tree.map(lambda a, p: np.testing.assert_allclose(a, p, atol=2e-3), average, now)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 8])
def test_averages_of_released_gradients_are_those_of_each_layer(bits):
    def embed_fn(embed, batch):
        return batch @ embed

    def layer_fn(layer, x, batch):
        return x + jnp.tanh(x @ layer)

    def loss_fn(head, embed, x, batch):
        return jnp.mean((x @ head - 1.0) ** 2)

    rng = np.random.default_rng(0)
    params = LayerStack(
        jnp.asarray(0.1 * rng.normal(size=(3, 64)), jnp.float32),
        jnp.asarray(0.1 * rng.normal(size=(2, 64, 64)), jnp.float32),
        jnp.ones((64, 1)),
    )
    found = []
    for each in (32, bits):
        law = Meta3(clip_threshold=None)
        tx = stabilize(optax.chain(optax.sgd(1e-3), average_iterates(bits=each)), law=law)
        released = release_gradients(tx, embed_fn, layer_fn, loss_fn)
        state, now = released.init(params), params
        for _ in range(20):
            now, state, _ = released.step(now, state, jnp.ones((8, 3)))
        found.append(averaged_params(state, now).layers)
    exact, coded = found
    distance = np.linalg.norm(exact - now.layers)
    assert np.linalg.norm(coded - exact) < ERROR[bits] * distance


@pytest.mark.parametrize(
    ("spec", "kind", "bits"),
    crossed([P("data"), P(None, "data")], [AxisType.Auto, AxisType.Explicit], [16, 8]),
    ids=str,
)
def test_sharded_averages_stay_where_they_are(bits, spec, kind):
    sharding = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(kind,)), spec)
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(256, 512)), jnp.float32)}
    tx = average_iterates(bits=bits)
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(params, state, params)
    with set_mesh(sharding.mesh):
        split = jax.device_put(params, sharding)
        after, step = tx.init(split), jax.jit(tx.update)
        assert moved_between_devices(step, split, after, split) == []
        for _ in range(2):
            _, after = step(split, after, split)
        assert after.average["w"].codes.sharding.is_equivalent_to(sharding, 2)
        average = averaged_params(after, split)["w"]
    np.testing.assert_allclose(average, averaged_params(state, params)["w"], rtol=1e-5)


def test_bits_are_static_under_inject_hyperparams():
    with_defaults = optax.inject_hyperparams(self_driving)(learning_rate=1e-3)
    with_defaults.init(tree())
    with pytest.raises(ValueError, match="name it in static_args under"):
        optax.inject_hyperparams(self_driving)(learning_rate=1e-3, average_bits=8).init(tree())
    static = optax.inject_hyperparams(self_driving, static_args=("average_bits",))
    static(learning_rate=1e-3, average_bits=8).init(tree())


@pytest.mark.parametrize("bits", [4, 0, "8", 8.0])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="average_bits must be 32, 16 or 8, got"):
        self_driving(average_bits=bits)
    with pytest.raises(ValueError, match="bits must be 32, 16 or 8, got"):
        average_iterates(bits=bits)
