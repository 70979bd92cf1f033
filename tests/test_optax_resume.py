"""A run stopped and resumed is, to the bit, the run that never stopped."""

import pickle

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

from cruxy_optax import meta3, self_driving, self_driving_lion, self_driving_muon
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


OTHERS = {
    "average left out": (self_driving, lambda: self_driving(averaging=None)),
    "average put in": (lambda: self_driving(averaging=None), self_driving),
    "another direction": (self_driving, self_driving_lion),
    "fewer bits": (self_driving, lambda: self_driving(state_bits=8)),
    "a direction given": (self_driving, lambda: self_driving(direction=optax.scale_by_adam())),
    "no decay": (self_driving, lambda: self_driving(weight_decay=0.0)),
    "another law": (self_driving, lambda: meta3(1e-3)),
    "matrices no more": (self_driving_muon, self_driving),
    "something around it": (lambda: optax.chain(optax.identity(), self_driving()), self_driving),
}


@pytest.mark.filterwarnings("ignore:state_bits=8 codes nothing")
@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_a_state_of_another_optimizer_is_said_to_be_one(name, jitted):
    before, after = (make() for make in OTHERS[name])
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    _, state = before.update(params, before.init(params), params, value=1.0)
    update = jax.jit(after.update) if jitted else after.update
    with pytest.raises(
        ValueError, match=r"state must be of this optimizer .* got \w+ in the place"
    ):
        update(params, state, params, value=1.0)


def test_an_error_of_another_kind_is_left_as_it_is():
    tx, params = self_driving(), {"w": jnp.ones(3)}
    with pytest.raises(TypeError, match="takes the loss as value="):
        tx.update(params, tx.init(params), params, loss=1.0)
    with pytest.raises(TypeError) as error:
        tx.update(params, tx.init(params), params, value="high")
    assert "state must be" not in str(error.value)
