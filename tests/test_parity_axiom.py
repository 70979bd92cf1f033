"""AXIOM and COSMIC are one optimizer each in both frameworks: step by step, guard included."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cruxy_optax
from cruxy_control import Meta3

torch = pytest.importorskip("torch")

from cruxy_torch import AXIOM, Cosmic  # noqa: E402
from relatives import relatives  # noqa: E402

STEPS, RATE, DECAY = 100, 3e-3, 0.1
SHAPES = {"conv": (3, 40, 50), "matrix": (60, 36), "narrow": (90, 8), "scalar": (), "vector": (30,)}

# Both frameworks round each float32 operation on their own: a step of size RATE times at most a
# few differs by a few ulps, at random, and 100 of them are added.
CLOSE = {"rtol": 10 * STEPS * 2.0**-24, "atol": 10 * STEPS * 2.0**-24}

AXIOMS = {
    "plain": ({}, {}),
    "clipped": ({"law": Meta3()}, {"law": Meta3()}),
    "relative": ({"relative_step": True}, {"relative_step": True}),
    "free": ({"clip_rms": None, "decay_rate": 0.5},) * 2,
    "momentum": ({"b1": 0.9, "momentum_bits": 32}, {"momentum": 0.9, "momentum_bits": 32}),
    "weighed": tuple(
        {name: 0.9, "momentum_bits": 32, "streak_boost": 1.4, "snr_floor": 0.1}
        for name in ("b1", "momentum")
    ),
}


def stream(seed=0):
    """Gradients with surges, spikes and steps that are not finite; losses with gaps."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0.0, 0.3, STEPS))
    size[30:40] *= 5.0
    size[60] = 1000.0
    grads = [
        {k: np.asarray(size[t] * rng.normal(size=s), np.float32) for k, s in SHAPES.items()}
        for t in range(STEPS)
    ]
    for t, bad in ((0, np.nan), (17, np.inf), (50, 1e30)):
        grads[t]["matrix"][1, 2] = bad
    losses = 2.0 - np.arange(STEPS) / STEPS + rng.normal(0, 0.05, STEPS)
    losses[5::11] = np.nan
    return grads, losses.astype(np.float32)


def start():
    rng = np.random.default_rng(7)
    return {k: np.asarray(0.3 * rng.normal(size=s), np.float32) for k, s in SHAPES.items()}


def assert_same_run(tx, optimizer, params):
    """`optimizer` holds `params`, which start as `start()`; both see the same stream."""

    @jax.jit
    def step(ours, state, grads, loss):
        updates, state = tx.update(grads, state, ours, value=loss)
        return optax.apply_updates(ours, updates), state

    ours = jax.tree.map(jnp.asarray, start())
    state = tx.init(ours)
    for grads, loss in zip(*stream(), strict=True):
        ours, state = step(ours, state, grads, loss)
        for k, p in params.items():
            p.grad = torch.tensor(grads[k])
        optimizer.step(loss=float(loss))
        for k, p in params.items():
            np.testing.assert_allclose(ours[k], p.detach().numpy(), **CLOSE, err_msg=k)
    shown = optimizer.telemetry()
    values = cruxy_optax.telemetry(state)
    assert int(values["skipped_total"]) == shown["skipped_total"] == 3
    np.testing.assert_allclose(float(values["learning_rate"]), shown["learning_rate"], rtol=2e-4)
    return state


def parameters():
    return {k: torch.nn.Parameter(torch.tensor(x)) for k, x in start().items()}


@pytest.mark.parametrize("name", relatives(AXIOMS, ["plain", "clipped", "weighed"]))
def test_axiom_agrees_step_by_step(name):
    theirs, ours = AXIOMS[name]
    params = parameters()
    optimizer = AXIOM(params.values(), lr=RATE, weight_decay=DECAY, **ours)
    tx = cruxy_optax.axiom(RATE, weight_decay=DECAY, **theirs)
    assert_same_run(tx, optimizer, params)


def test_axiom_keeps_the_same_means():
    params = parameters()
    optimizer = AXIOM(params.values(), lr=RATE, weight_decay=DECAY)
    state = assert_same_run(cruxy_optax.axiom(RATE, weight_decay=DECAY), optimizer, params)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, "v_row"))
    (moments,) = (node for node in nodes if hasattr(node, "v_row"))
    for k, p in params.items():
        names = {"row_var": "v_row", "col_var": "v_col", "variance": "v"}
        for ours, theirs in names.items():
            if ours in optimizer.state[p]:
                expected = np.asarray(getattr(moments, theirs)[k])
                value = optimizer.state[p][ours].numpy().reshape(expected.shape)
                np.testing.assert_allclose(value, expected, rtol=STEPS * 2.0**-22)


@pytest.mark.parametrize("room", ["signs", "scalars", "some", "all"])
def test_cosmic_agrees_step_by_step(room):
    budget = {"signs": 504, "scalars": 524, "some": "20KB", "all": "1MB"}[room]
    params = parameters()
    options = {"lr": RATE, "weight_decay": DECAY, "retier_every": None}
    optimizer = Cosmic(params.items(), state_budget=budget, **options)
    optimizer.param_groups[0]["lr"] = 0.0
    for p in params.values():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()  # plans, and does nothing else
    tiers = optimizer.tiers()
    wanted = {"signs": {0}, "scalars": {1}, "some": {1, 2}, "all": {2}}[room]
    assert set(tiers.values()) == wanted
    params = parameters()
    optimizer = Cosmic(params.items(), state_budget=budget, **options)
    paths = {f"['{name}']": tier for name, tier in tiers.items()}
    tx = cruxy_optax.cosmic(RATE, "1MB", weight_decay=DECAY, tiers=paths)
    assert_same_run(tx, optimizer, params)
