"""A run on one mesh goes on another: every JAX optimizer in every number of bits, by Orbax."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cruxy_optax as ours
from relatives import crossed
from test_scale import placed, step_of, tree

ocp = pytest.importorskip("orbax.checkpoint")

BITS = (32, 16, 8, 4)
ROUNDED = {"tiger-16": float(jnp.finfo(jnp.bfloat16).eps)}
"""Where a direction is made of the momentum as it is stored: sums over other shards round
otherwise, and what lies between two numbers of 16 bits may become the other."""
MAKERS = {
    "meta3": lambda bits: ours.meta3(1e-3, state_bits=bits),
    "meta_lion": lambda bits: ours.meta_lion(1e-3, state_bits=bits),
    "stability_v1": lambda bits: ours.stability_v1(1e-3, state_bits=bits),
    "stability_v2": lambda bits: ours.stability_v2(1e-3, state_bits=bits),
    "self_driving": lambda bits: ours.self_driving(state_bits=bits),
    "self_driving_lion": lambda bits: ours.self_driving_lion(state_bits=bits),
    "self_driving_muon": lambda bits: ours.self_driving_muon(state_bits=bits),
    "axiom": lambda bits: ours.axiom(1e-3, b1=0.9, momentum_bits=bits),
    "cosmic": lambda bits: ours.cosmic(1e-3, state_budget="40KB", state_bits=bits),
    "tiger": lambda bits: ours.tiger(1e-3, state_bits=bits),
}


def on(shape):
    """Parameters and gradients on a mesh of this shape."""
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return [placed(tree(seed), mesh, P("data", "model"), P()) for seed in (0, 1)]


def on_the_mesh_of(params, state):
    """A state whose scalars, which depend on no parameter, are on every device as well."""
    everywhere = NamedSharding(jax.tree.leaves(params)[0].sharding.mesh, P())
    return jax.tree.map(
        lambda x: x if len(x.devices()) > 1 else jax.device_put(x, everywhere), state
    )


@pytest.mark.parametrize(("name", "bits"), crossed(MAKERS, BITS, fast=[("self_driving", 4)]))
def test_a_run_on_one_mesh_goes_on_another(name, bits, tmp_path):
    tx = MAKERS[name](bits)
    step = jax.jit(step_of(tx))
    params, grads = on((4, 2))
    _, state = step(grads, jax.jit(tx.init)(params), params)
    wanted, _ = step(grads, state, params)
    folder = os.fspath(tmp_path / "state")
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder, state)
        saver.wait_until_finished()
        params, grads = on((2, 4))
        like = on_the_mesh_of(params, jax.jit(tx.init)(params))
        restored = saver.restore(folder, like)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    kept = jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, like)
    assert all(jax.tree.leaves(kept))
    got, _ = step(grads, restored, params)
    # Sums over other shards round otherwise.
    bound = ROUNDED.get(f"{name}-{bits}", 1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=bound, atol=1e-7),
        jax.device_get(got),
        jax.device_get(wanted),
    )
