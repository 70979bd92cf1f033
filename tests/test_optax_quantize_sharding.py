"""Low-bit states on eight devices: nothing but scalars moves between them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cruxy_optax import meta3, quantize_state
from jax_versions import set_mesh
from low_bit import coded, heavy_tailed
from relatives import crossed, relatives

every_bits = pytest.mark.parametrize("bits", [8, 4])


def moved_between_devices(step, *args):
    """What the compiled step sends between devices, but for scalars."""
    text = step.lower(*args).compile().as_text()
    found = re.findall(r"= (.*?) (all-gather|all-to-all|collective-permute|all-reduce)[-(]", text)
    return [(shape, op) for shape, op in found if re.search(r"\[\d", shape)]


@pytest.mark.parametrize(
    ("bits", "spec", "kind"),
    crossed([8, 4], [P("data"), P(None, "data")], [AxisType.Auto, AxisType.Explicit]),
    ids=str,
)
def test_sharded_leaves_stay_where_they_are(bits, spec, kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    sharding = NamedSharding(mesh, spec)
    params = {"w": jnp.asarray(heavy_tailed((256, 512), True))}
    tx = quantize_state(optax.adam(0.01), bits)
    want = tx.update(params, tx.init(params), params)
    with set_mesh(mesh):
        split = jax.device_put(params, sharding)
        state = tx.init(split)
        step = jax.jit(tx.update)
        assert moved_between_devices(step, split, state, split) == []
        updates, after = step(split, state, split)
        for leaf in coded(after).values():
            assert leaf.codes.sharding.is_equivalent_to(sharding, 2)
            assert leaf.scales.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(updates["w"], want[0]["w"], rtol=1e-5)
    for path, leaf in coded(want[1]).items():
        different = np.asarray(coded(jax.device_get(after))[path].codes) != np.asarray(leaf.codes)
        assert np.mean(different) < 0.01


@pytest.mark.parametrize("bits", relatives([8, 4], [4]))
def test_shard_map_over_the_parameters(bits):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    tx, params = meta3(0.01, axis_names="data", state_bits=bits), {"w": jnp.ones((128, 64))}
    state = tx.init(params)
    specs = jax.tree.map(lambda x: P("data") if x.ndim == 2 else P(), state)
    step = jax.jit(
        jax.shard_map(
            lambda g, s, p: tx.update(g, s, p, value=1.0),
            mesh=mesh,
            in_specs=(P("data"), specs, P("data")),
            out_specs=(P("data"), specs),
        )
    )
    updates, after = step(params, state, params)
    updates, after = step(params, after, params)
    want = meta3(0.01, state_bits=bits)
    alone, before = want.update(params, state, params, value=1.0)
    alone, before = want.update(params, before, params, value=1.0)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)
    np.testing.assert_allclose(updates["w"], alone["w"], rtol={8: 0.05, 4: 0.3}[bits])
