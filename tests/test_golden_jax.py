"""Today's JAX optimizers give the numbers, and load the states, of the commit before."""

from pathlib import Path

import jax
import numpy as np
import pytest

import golden_jax as golden
from golden_runs import SAVED, STEPS, digest

KEPT = np.load(Path(__file__).parent / "golden" / "jax.npz")
SAME = {k: str(KEPT[f"basis/{k}"]) for k in golden.basis()} == golden.basis()
"""Whether this machine, jax and optax are those that the fixture was written with."""


def saved_half_way(name, params, state):
    """The parameters and the state of the fixture, in the structure of today's."""
    flat, tree = jax.tree.flatten((params, state))
    assert golden.paths((params, state)) == list(KEPT[f"{name}/paths"])
    leaves = [KEPT[f"{name}/leaf/{i}"] for i in range(len(flat))]
    leaves = [
        leaf.view(like.dtype) if like.dtype.name == "bfloat16" else leaf
        for leaf, like in zip(leaves, flat, strict=True)
    ]
    assert [leaf.dtype for leaf in leaves] == [like.dtype for like in flat]
    return tree.unflatten([jax.numpy.asarray(leaf) for leaf in leaves])


@pytest.mark.parametrize("name", list(golden.RUNS))
def test_a_state_of_the_commit_before_continues_as_it_did(name):
    make, dtype = golden.RUNS[name]
    tx, params = make(), golden.parameters(dtype)
    params, state = golden.train(tx, params, tx.init(params), range(SAVED), dtype)
    begun = digest(golden.bits(params, state))
    saved = saved_half_way(name, params, state)
    if SAME:
        assert begun == digest(golden.bits(*saved))
    params, state = golden.train(tx, *saved, range(SAVED, STEPS), dtype)
    if SAME:
        assert digest(golden.bits(params, state)) == str(KEPT[f"{name}/digest"])
    wanted = KEPT[f"{name}/after"].astype(np.float64)
    error = np.asarray(params["w"][:4], np.float64) - wanted
    assert np.sqrt(np.mean(error**2)) < 0.02 * np.sqrt(np.mean(wanted**2))
