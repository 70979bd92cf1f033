"""Today's JAX optimizers give the numbers, and load the states, of the commit before."""

from pathlib import Path

import jax
import numpy as np
import pytest

import golden_jax as golden
from cruxy_control.controls import DRIVEN
from cruxy_control.signals import NOT_KNOWN
from cruxy_optax import StabilizeState
from golden_runs import SAVED, STEPS, digest
from relatives import relatives

KEPT = np.load(Path(__file__).parent / "golden" / "jax.npz")
SAME = {k: str(KEPT[f"basis/{k}"]) for k in golden.basis()} == golden.basis()
"""Whether this machine, jax and optax are those that the fixture was written with."""


def added_since(path):
    """What a state had not then: when a rate ends, what holds it, what was set."""
    names = (".cooldown.", ".hold.", ".base_rate", ".momentum_ratio")
    return any(name in path for name in names) or path.endswith(
        tuple(f".controls.{n}" for n in DRIVEN)
    )


def saved_half_way(name, params, state):
    """The parameters and the state of the fixture, in the structure of today's."""
    flat, tree = jax.tree.flatten((params, state))
    paths = golden.paths((params, state))
    old = [i for i, path in enumerate(paths) if not added_since(path)]
    then = [paths[i].replace(".applied_rate", ".learning_rate") for i in old]
    assert then == list(KEPT[f"{name}/paths"])
    leaves = list(flat)
    for number, i in enumerate(old):
        leaf, like = KEPT[f"{name}/leaf/{number}"], flat[i]
        leaves[i] = leaf.view(like.dtype) if like.dtype.name == "bfloat16" else leaf
    assert [leaf.dtype for leaf in leaves] == [like.dtype for like in flat]
    return tree.unflatten([jax.numpy.asarray(leaf) for leaf in leaves])


def as_stored_then(params, state):
    """Today's state with infinity for the threshold of a law that does not clip, as it was then.

    Today it is `NOT_KNOWN`: whoever searches a checkpoint takes infinity for damage. What was added
    since is left out.
    """

    def infinite(node):
        if not isinstance(node, StabilizeState):
            return node
        threshold = node.controls.clip_threshold
        threshold = jax.numpy.where(threshold == NOT_KNOWN, np.inf, threshold)
        return node._replace(controls=node.controls._replace(clip_threshold=threshold))

    def is_controller(node):
        return isinstance(node, StabilizeState)

    state = jax.tree.map(infinite, state, is_leaf=is_controller)
    kept = [
        leaf
        for leaf, path in zip(jax.tree.leaves(state), golden.paths(state), strict=True)
        if not added_since(path)
    ]
    return params, kept


FAST = (
    *("meta3", "meta_lion-16", "self_driving-8", "self_driving_lion-4", "stability_v2"),
    *("axiom-8", "cosmic", "around_optax"),
)
"""Of every family one, and of every number of bits."""


@pytest.mark.parametrize("name", relatives(golden.RUNS, FAST))
def test_a_state_of_the_commit_before_continues_as_it_did(name):
    make, dtype = golden.RUNS[name]
    tx, params = make(), golden.parameters(dtype)
    params, state = golden.train(tx, params, tx.init(params), range(SAVED), dtype)
    begun = digest(golden.bits(*as_stored_then(params, state)))
    saved = saved_half_way(name, params, state)
    if SAME:
        assert begun == digest(golden.bits(*as_stored_then(*saved)))
    params, state = golden.train(tx, *saved, range(SAVED, STEPS), dtype)
    if SAME:
        assert digest(golden.bits(*as_stored_then(params, state))) == str(KEPT[f"{name}/digest"])
    wanted = KEPT[f"{name}/after"].astype(np.float64)
    error = np.asarray(params["w"][:4], np.float64) - wanted
    assert np.sqrt(np.mean(error**2)) < 0.02 * np.sqrt(np.mean(wanted**2))
