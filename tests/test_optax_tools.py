"""States in the hands of other tools: Flax, nnx, optax.tree, NumPy; plain numbers for arrays."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization

from cruxy_optax import (
    average_iterates,
    axiom,
    cosmic,
    limit_relative_step,
    meta3,
    quantize_state,
    round_updates,
    self_driving,
    telemetry,
)
from jax_versions import as_pure
from relatives import crossed, relatives

TX = {
    "meta3": lambda: meta3(1e-2),
    "meta3, 8 bits": lambda: meta3(1e-2, state_bits=8),
    "self_driving, 4 bits": lambda: self_driving(state_bits=4),
    "axiom, 4 bits": lambda: axiom(1e-2, 0.9),
    "cosmic": lambda: cosmic(1e-2, "100KB"),
    "cosmic, 8 bits": lambda: cosmic(1e-2, "100KB", state_bits=8),
    "cosmic, low tiers": lambda: cosmic(1e-2, "1KB"),
    "around": lambda: quantize_state(meta3(1e-2)),
    "rounded": lambda: round_updates(meta3(1e-2)),
    "kahan": lambda: round_updates(meta3(1e-2), "kahan"),
}
every_tx = pytest.mark.parametrize("name", TX)
different_tx = pytest.mark.parametrize(
    "name", relatives(TX, ["meta3", "self_driving, 4 bits", "cosmic, low tiers", "kahan"])
)


def begun(tx):
    params = {"w": jnp.linspace(-1.0, 1.0, 64 * 80).reshape(64, 80), "b": jnp.ones(5)}
    _, state = tx.update(params, tx.init(params), params, value=1.0)
    return params, state


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@different_tx
def test_state_written_by_flax_and_read_again_goes_on_as_it_would_have(name):
    tx = TX[name]()
    params, state = begun(tx)
    read = serialization.from_bytes(tx.init(params), serialization.to_bytes(state))
    same(tx.update(params, read, params, value=0.9), tx.update(params, state, params, value=0.9))


def test_flax_refuses_to_read_codes_and_tiers_into_others():
    params, state = begun(cosmic(1e-2, "100KB"))
    other = cosmic(1e-2, "1KB").init(params)
    with pytest.raises(ValueError, match=r"TierPlan\.tiers must be that of the state which was"):
        serialization.from_bytes(other, serialization.to_bytes(state))
    params, state = begun(meta3(1e-2, state_bits=8))
    other = meta3(1e-2, state_bits=4).init(params)
    with pytest.raises(ValueError, match=r"LowBitArray\.code must be that of the state which was"):
        serialization.from_bytes(other, serialization.to_bytes(state))


@every_tx
def test_state_of_numpy_arrays_goes_on_as_it_would_have(name):
    tx = TX[name]()
    params, state = begun(tx)
    restored = jax.tree.map(np.asarray, state)
    same(
        tx.update(params, restored, params, value=0.9), tx.update(params, state, params, value=0.9)
    )


@every_tx
def test_map_params_of_optax_reaches_the_moments_and_leaves_the_rest_as_it_is(name):
    tx = TX[name]()
    _, state = begun(tx)
    same(optax.tree.map_params(tx, lambda x: x, state), state)
    zeros = optax.tree.map_params(tx, jnp.zeros_like, state)
    assert jax.tree.structure(zeros) == jax.tree.structure(state)
    sizes = [float(jnp.abs(x).max()) for x in jax.tree.leaves(zeros) if x.shape[:1] == (64,)]
    assert sizes == [0.0] * len(sizes)


@different_tx
def test_optimizer_of_nnx_trains_as_a_loop_of_ones_own(name):
    model = nnx.Linear(64, 80, rngs=nnx.Rngs(0))
    tx = TX[name]()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = as_pure(nnx.state(model, nnx.Param))
    state = tx.init(params)
    boxed = jax.tree.map(lambda p: p + 0.1, nnx.state(model, nnx.Param))
    grads = as_pure(boxed)
    for loss in (1.0, 0.9, 0.8):
        optimizer.update(model, boxed, value=loss)
        updates, state = tx.update(grads, state, params, value=loss)
        params = optax.apply_updates(params, updates)
    same(as_pure(nnx.state(model, nnx.Param)), params)


def test_telemetry_of_cosmic_in_nnx_still_has_its_decay_rates():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, cosmic(1e-2, "10KB"), wrt=nnx.Param)
    optimizer.update(model, nnx.state(model, nnx.Param), value=1.0)
    assert float(telemetry(optimizer.opt_state)["beta2"]) == pytest.approx(0.9)


NUMBERS = TX | {
    "axiom, relative": lambda: axiom(1e-2, 0.9, relative_step=True, snr_floor=0.1),
    "limited": lambda: optax.with_extra_args_support(
        optax.chain(optax.sgd(0.1), limit_relative_step(0.5), average_iterates())
    ),
}


@pytest.mark.parametrize(("name", "number"), crossed(NUMBERS, [1.5, np.float32(1.5)]))
def test_plain_number_among_the_parameters_is_trained_as_an_array_of_it(name, number):
    tx = NUMBERS[name]()

    def after(t):
        params = {"w": jnp.ones((3, 4)), "t": t}
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(params, state, params, value=1.0)
        return updates["t"]

    np.testing.assert_allclose(after(number), after(jnp.float32(1.5)), rtol=1e-6)


def test_flax_is_not_imported_for_those_who_do_not():
    code = "import sys, jax.numpy as jnp, cruxy_optax as c; c.cosmic().init(jnp.ones(3)); "
    code += "c.meta3(1e-3, state_bits=8).init(jnp.ones((64, 64))); assert 'flax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
