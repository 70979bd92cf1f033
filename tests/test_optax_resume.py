"""A run stopped and resumed is, to the bit, the run that never stopped."""

import pickle

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from optimizers import (
    OPTIMIZERS,
    assert_same,
    different_optimizers,
    gradients,
    train,
    tree,
)

STOP, STEPS = 7, 15


def halves(name):
    tx, (grads, losses) = OPTIMIZERS[name](), gradients(STEPS)
    first = jax.tree.map(lambda g: g[:STOP], grads), losses[:STOP]
    second = jax.tree.map(lambda g: g[STOP:], grads), losses[STOP:]
    return tx, first, second


# Orbax stores no zero-size arrays.
def start():
    return {k: v for k, v in tree().items() if v.size}


def trim(stack):
    return {k: v for k, v in stack.items() if v.size}


@different_optimizers
def test_orbax_resume_is_bit_identical(name, tmp_path):
    tx, (g1, l1), (g2, l2) = halves(name)
    params, state = train(tx, start(), trim(g1), l1)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        blank = {"params": start(), "state": tx.init(start())}
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, blank)
        loaded = checkpointer.restore(tmp_path / "step", template)
    assert_same(loaded, {"params": params, "state": state})
    got = train(tx, loaded["params"], trim(g2), l2, loaded["state"])
    assert_same(got, train(tx, params, trim(g2), l2, state))


@different_optimizers
def test_pickled_state_resumes_bit_identical(name):
    tx, (g1, l1), (g2, l2) = halves(name)
    params, state = train(tx, tree(), g1, l1)
    loaded_params, loaded = pickle.loads(pickle.dumps(jax.device_get((params, state))))
    assert type(loaded) is type(state)
    loaded_params, loaded = jax.tree.map(jnp.asarray, (loaded_params, loaded))
    got = train(tx, loaded_params, g2, l2, loaded)
    assert_same(got, train(tx, params, g2, l2, state))
