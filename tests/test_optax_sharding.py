"""Meshes of 2 and 8 devices give the single-device result and keep the parameters' sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cruxy_optax import limit_relative_step, meta3, meta_lion, self_driving, telemetry
from jax_versions import set_mesh, varying
from optimizers import assert_close
from relatives import crossed

OPTIMIZERS = {"meta3": meta3, "meta_lion": meta_lion, "self_driving": self_driving}
STEPS = 5
every_mesh = pytest.mark.parametrize("devices", [2, 8])


def mesh_of(devices):
    assert jax.device_count() >= devices, "tests/conftest.py asks for eight CPU devices"
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


def problem():
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(8,)), jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(STEPS, 32, 16)), jnp.float32)
    return params, x


def loss_fn(params, x):
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) - 1.0) ** 2)


def step_with(tx):
    def step(params, state, x):
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    return step


def single_device(tx):
    params, x = problem()
    state = tx.init(params)
    for t in range(STEPS):
        params, state = jax.jit(step_with(tx))(params, state, x[t])
    return params, state


# The order of a sum over devices is not that of one device; each step adds a few roundings.
ULPS = 512


@pytest.mark.parametrize(("name", "devices", "split"), crossed(OPTIMIZERS, [2, 8], [True, False]))
def test_jit_with_sharded_arrays(name, devices, split):
    tx, mesh = OPTIMIZERS[name](0.01), mesh_of(devices)
    params, x = problem()
    specs = {"w": P("data") if split else P(), "b": P("data") if split else P()}
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
    params = jax.device_put(params, shardings)
    x = jax.device_put(x, NamedSharding(mesh, P(None, "data")))
    state = jax.jit(tx.init)(params)
    step = jax.jit(step_with(tx), out_shardings=(shardings, None))
    for t in range(STEPS):
        params, state = step(params, state, x[t])
    want = single_device(OPTIMIZERS[name](0.01))
    assert_close(jax.device_get((params, state)), jax.device_get(want), ULPS)
    moments = state.inner_state[1]
    for leaf, sharding in shardings.items():
        assert moments.mu[leaf].sharding.is_equivalent_to(sharding, moments.mu[leaf].ndim)


def test_eager_init_keeps_the_sharding():
    mesh = mesh_of(2)
    sharding = NamedSharding(mesh, P("data"))
    params = {"w": jax.device_put(jnp.ones((16, 8)), sharding)}
    adam = meta3(0.01).init(params).inner_state[1]
    assert adam.mu["w"].sharding.is_equivalent_to(sharding, 2)
    assert adam.nu["w"].sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize(("name", "devices"), crossed(OPTIMIZERS, [2, 8]))
def test_shard_map_over_the_batch(name, devices):
    tx, mesh = OPTIMIZERS[name](0.01, axis_names="data"), mesh_of(devices)
    params, x = problem()

    def step(params, state, x):
        # Each device has its own loss; the gradients come averaged, as data parallelism has them.
        local = varying(params, "data")
        loss, grads = jax.value_and_grad(loss_fn)(local, x)
        grads = jax.lax.pmean(grads, "data")
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    step = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P()))
    )
    state = tx.init(params)
    for t in range(STEPS):
        params, state = step(params, state, x[t])
    assert_close((params, state), single_device(OPTIMIZERS[name](0.01)), ULPS)


@every_mesh
@pytest.mark.parametrize(
    ("make", "rate"),
    [(make, 0.01) for make in (*OPTIMIZERS.values(), limit_relative_step)] + [(self_driving, 1e3)],
)
def test_shard_map_over_the_parameters(make, rate, devices):
    """Norms and sizes are taken over all shards, and over a copy only once."""
    tx, mesh = make(rate, axis_names="data"), mesh_of(devices)
    params, _ = problem()
    grads = jax.tree.map(lambda p: 0.3 * p, params)
    specs = {"w": P("data"), "b": P()}

    alone = make(rate)
    state = alone.init(params)
    state_specs = jax.tree_util.tree_map_with_path(
        lambda path, _: P("data") if "'w'" in jax.tree_util.keystr(path) else P(), state
    )
    step = jax.shard_map(
        lambda g, s, p: tx.update(g, s, p, value=1.0),
        mesh=mesh,
        in_specs=(specs, state_specs, specs),
        out_specs=(specs, state_specs),
    )
    updates, after = jax.jit(step)(grads, state, params)
    want = alone.update(grads, state, params, value=1.0)
    assert_close((updates, after), want, ULPS)


@every_mesh
def test_one_bad_shard_stops_every_device(devices):
    tx, mesh = meta3(0.01, axis_names="data"), mesh_of(devices)
    params = {"w": jnp.ones((16, 8))}
    grads = {"w": jnp.ones((16, 8)).at[15, 0].set(jnp.nan)}
    state = tx.init(params)
    specs = jax.tree.map(lambda x: P("data") if x.ndim == 2 else P(), state)
    step = jax.shard_map(
        lambda g, s, p: tx.update(g, s, p),
        mesh=mesh,
        in_specs=(P("data"), specs, P("data")),
        out_specs=(P("data"), specs),
    )
    updates, state = jax.jit(step)(grads, state, params)
    assert np.all(updates["w"] == 0)
    assert int(state.skipped_total) == 1


@pytest.mark.parametrize("devices", [2])
def test_pmap_decides_alike_on_every_device(devices):
    tx = meta3(0.01, axis_names="data")
    params, x = problem()

    @functools.partial(jax.pmap, axis_name="data", devices=jax.devices()[:devices])
    def step(params, state, x):
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        grads = jax.lax.pmean(grads, "data")
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    params, state = jax.tree.map(lambda p: jnp.stack([p] * devices), (params, state))
    for t in range(STEPS):
        params, state = step(params, state, x[t].reshape(devices, -1, 16))
    shown = telemetry(state)
    for value in shown.values():
        np.testing.assert_array_equal(value[0], value[1])
    got = jax.tree.map(lambda leaf: leaf[0], (params, state))
    assert_close(jax.device_get(got), jax.device_get(single_device(meta3(0.01))), ULPS)


@pytest.mark.parametrize("rows", [384, 1040])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_norms_of_a_sharded_matrix_whatever_its_rows_a_device(rows, kind):
    """48 rows are whole blocks of the one-pass sum, 130 are not."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(rows, 64)), jnp.float32)
    tx = meta3(0.01)
    want = telemetry(tx.update(grads, tx.init(grads), grads)[1])
    split = jax.device_put(grads, NamedSharding(mesh, P("data", None)))
    with set_mesh(mesh):
        state = jax.jit(lambda g: tx.update(g, tx.init(g), g)[1])(split)
    for name in ("grad_norm", "gamma_norm"):
        np.testing.assert_allclose(float(telemetry(state)[name]), float(want[name]), rtol=1e-5)
