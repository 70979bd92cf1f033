"""Directions that are given to `self_driving`: of which kind, where they have moments, refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cruxy_control import Meta3
from cruxy_optax import (
    label_roles,
    meta3,
    quantize_state,
    release_gradients,
    scale_by_controlled_lion,
    scale_by_controlled_muon,
    self_driving,
    telemetry,
)
from optimizers import assert_same

PARAMS = {"k": jnp.eye(4) + 0.5, "b": jnp.ones(4)}
BRANCHES = {
    "a": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)},
    "b": {"kernel": jnp.ones((6, 2)), "bias": jnp.zeros(2)},
}


def stepped(direction, params, steps=3, **options):
    tx = self_driving(direction=direction, **options)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        grads = jax.tree.map(lambda p, step=step: p - 0.3 * step, params)
        updates, state = update(grads, state, params, value=1.0)
        params = optax.apply_updates(params, updates)
    return params, state


MUON = {"m": scale_by_controlled_muon(), "v": optax.scale_by_adam()}
LION = {"m": scale_by_controlled_lion(), "v": optax.scale_by_lion()}


def by_axes(params):
    return jax.tree.map(lambda x: "m" if x.ndim > 1 else "v", params)


@pytest.mark.parametrize("parts", [MUON, LION], ids=["muon", "lion"])
def test_labels_as_a_tree_and_as_a_function_are_of_one_kind(parts):
    runs = [
        stepped(optax.partition(parts, labels), PARAMS) for labels in (by_axes, by_axes(PARAMS))
    ]
    assert_same(*runs)
    assert float(telemetry(runs[0][1])["set_point"]) == float(telemetry(runs[1][1])["set_point"])


def test_a_mask_as_a_tree_has_the_kind_of_what_it_masks():
    """Found by what the state for the parameters says: for a small matrix there is none."""
    seen = []
    for mask in ({"k": True, "b": False}, lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)):
        direction = optax.masked(scale_by_controlled_muon(), mask)
        seen.append(stepped(direction, PARAMS)[1])
    assert [float(telemetry(state)["set_point"]) for state in seen] == [pytest.approx(-0.07)] * 2
    assert_same(*seen)


def test_arguments_are_checked_before_the_kind_is_known():
    labels = optax.partition(MUON, by_axes(PARAMS))
    with pytest.raises(ValueError, match=r"relative_limit must be in \(0, infinity\), got 0"):
        self_driving(direction=labels, relative_limit=0.0)
    tx = self_driving(direction=labels, law=Meta3())
    with pytest.raises(ValueError, match=r"knows the kind of its direction, .* use meta3\(\)"):
        release_gradients(tx, *[lambda *args: args[0]] * 3)


@pytest.mark.parametrize(
    "direction",
    [
        optax.partition(
            {"x": optax.scale_by_adam(), "y": optax.scale_by_lion()}, {"a": "x", "b": "y"}
        ),
        optax.masked(optax.scale_by_adam(), {"a": True, "b": False}),
        optax.masked(quantize_state(optax.scale_by_adam(), 8), {"a": True, "b": False}),
    ],
    ids=["labels", "mask", "coded"],
)
def test_a_label_or_mask_may_be_that_of_a_branch(direction):
    _, state = stepped(direction, BRANCHES)
    assert float(telemetry(state)["alignment"]) > 0.0


def test_a_mask_of_a_branch_is_one_of_its_leaves():
    whole = {"a": True, "b": False}
    each = {k: {"kernel": m, "bias": m} for k, m in whole.items()}
    runs = [stepped(optax.masked(optax.scale_by_adam(), m), BRANCHES)[0] for m in (whole, each)]
    assert_same(*runs)


@pytest.mark.parametrize(
    "direction",
    [
        optax.adam(1e-3),
        optax.lion(1e-4),
        optax.adamw(optax.linear_schedule(1e-3, 0.0, 9)),
        optax.chain(optax.scale_by_adam(), optax.scale(-0.1)),
    ],
    ids=["adam", "lion", "adamw", "scale"],
)
def test_a_direction_that_points_against_the_gradient_is_refused(direction):
    with pytest.raises(ValueError, match=r"direction must be without a learning rate, such as"):
        self_driving(direction=direction)


def test_a_direction_is_taken_inside_jit_and_with_traced_numbers():
    @jax.jit
    def one_step(b1):
        tx = self_driving(direction=optax.scale_by_adam(b1=b1))
        return tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0]

    tx = self_driving(direction=optax.scale_by_adam(b1=0.8))
    want, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(one_step(0.8)["b"], want["b"], rtol=1e-6)


def test_a_mapping_of_directions_is_shown_the_way():
    with pytest.raises(TypeError, match=r"optax\.partition\(\{\.\.\.\}, cruxy_optax\.label_roles"):
        self_driving(direction={"embedding": optax.scale_by_adam()})
    by_role = {"embedding": optax.scale_by_adam(), "matrix": optax.scale_by_lion()}
    params = {"wte": {"embedding": jnp.ones((4, 4))}, "x": {"w": jnp.ones((4, 4))}}
    _, state = stepped(optax.partition(by_role, label_roles), params)
    lion = stepped(optax.scale_by_lion(), params)[1]
    assert float(telemetry(state)["set_point"]) == float(telemetry(lion)["set_point"])


@pytest.mark.parametrize("direction", [optax.scale_by_amsgrad(), optax.scale_by_belief()])
def test_amsgrad_and_adabelief_are_steered_by_their_first_moment(direction):
    _, state = stepped(direction, PARAMS)
    _, adam = stepped(optax.scale_by_adam(), PARAMS)
    assert float(state.signals.alignment) == pytest.approx(float(adam.signals.alignment), rel=0.2)


def test_a_state_of_which_nothing_is_known_is_named():
    tx = self_driving(direction=optax.scale_by_novograd())
    with pytest.raises(ValueError, match=r"ScaleByNovogradState.*a property first_moment"):
        tx.init(PARAMS)


@pytest.mark.parametrize("make", [self_driving, lambda: meta3(1e-3)], ids=["driven", "meta3"])
def test_gradients_for_other_parameters_are_at_fault_themselves(make):
    tx = make()
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"gradients must be a tree like the parameters, got "):
        tx.update({"k": PARAMS["k"]}, state, PARAMS, value=1.0)


def test_what_is_frozen_stands_outside():
    labels = {"k": "moved", "b": "frozen"}
    tx = optax.partition({"moved": self_driving(), "frozen": optax.set_to_zero()}, labels)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.0)
    assert not updates["b"].any()
    assert updates["k"].any()
