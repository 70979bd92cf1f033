"""The table of optimizers and parameter trees that the Optax tests run through."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cruxy_control import Meta3, StabilityV2
from cruxy_optax import (
    axiom,
    clip_by_predicted_norm,
    cosmic,
    meta3,
    meta_lion,
    scale_by_controlled_adam,
    scale_by_controlled_lion,
    scale_by_meta_learning_rate,
    self_driving,
    self_driving_lion,
    stability_v1,
    stability_v2,
    stabilize,
    throttle_by_phase,
    tiger,
)
from relatives import relatives


def _plain(rate):
    return rate if callable(rate) else optax.constant_schedule(rate)


OPTIMIZERS = {
    "meta3": lambda rate=0.01: meta3(rate, weight_decay=0.01),
    "meta3_plain": lambda rate=0.01: meta3(
        rate, weight_decay=0.0, nesterov=False, law=Meta3(clip_threshold=None, phase_strength=0.0)
    ),
    "meta_lion": lambda rate=0.01: meta_lion(rate, weight_decay=0.01),
    "meta_lion_bfloat16": lambda rate=0.01: meta_lion(rate, mu_dtype=jnp.bfloat16),
    "stability_v1": lambda rate=0.01: stability_v1(rate),
    "stability_v2": lambda rate=0.01: stability_v2(rate),
    "self_driving": lambda rate=0.01: self_driving(rate, weight_decay=0.01),
    "self_driving_lion": lambda rate=0.01: self_driving_lion(
        rate, relative_limit=0.03, averaging=None
    ),
    "axiom": lambda rate=0.01: axiom(rate, b1=0.9, momentum_bits=32, weight_decay=0.01),
    "tiger": lambda rate=0.01: tiger(
        rate,
        blend=optax.constant_schedule(0.3),
        power=0.5,
        trust_cap=10.0,
        trust_decay=0.9,
        agc=1.0,
    ),
    "cosmic": lambda rate=0.01: cosmic(rate, state_budget="1KB", weight_decay=0.01),
    "schedule": lambda rate=0.01: meta3(optax.join_schedules([_plain(rate)] * 2, [20])),
    "own_chain": lambda rate=0.01: stabilize(
        optax.chain(
            clip_by_predicted_norm(),
            optax.partition(
                {"a": scale_by_controlled_adam(), "l": scale_by_controlled_lion()},
                lambda params: jax.tree.map(lambda p: "a" if p.ndim > 1 else "l", params),
            ),
            optax.add_decayed_weights(0.01),
            throttle_by_phase(),
            scale_by_meta_learning_rate(rate),
        ),
        law=StabilityV2(),
    ),
    "around_optax": lambda rate=0.01: stabilize(
        optax.chain(
            clip_by_predicted_norm(), optax.scale_by_rms(), optax.scale_by_learning_rate(rate)
        )
    ),
}
"""Every alias, its main options, a chain of the user's own, and one with optax's own states."""

RELATED = (
    "meta3_plain",
    "meta_lion_bfloat16",
    "self_driving_lion",
    "axiom",
    "tiger",
    "schedule",
    "stability_v2",
)
"""They have a near relative in the table and tests of their own."""

UNRELATED = tuple(name for name in OPTIMIZERS if name not in RELATED)
DIFFERENT = ("meta_lion", "self_driving", "cosmic", "own_chain")
"""The fewest in which every transformation and nearly every law comes up."""

every_optimizer = pytest.mark.parametrize("name", relatives(OPTIMIZERS, UNRELATED))
different_optimizers = pytest.mark.parametrize("name", relatives(OPTIMIZERS, DIFFERENT))
"""Where each costs seconds."""


def tree(dtype=jnp.float32, seed=0):
    """A small tree with a matrix, a vector, a 0-d and a zero-size leaf."""
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {"w": leaf(4, 8), "b": leaf(8), "s": leaf(), "none": leaf(0, 3)}


def gradients(steps, dtype=jnp.float32, seed=1):
    """A stack of gradients like `tree`, one a step, and the losses."""
    each = [tree(dtype, seed + t) for t in range(steps)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    return stacked, jnp.linspace(2.0, 1.0, steps, dtype=jnp.float32)


def at(stacked, t):
    """One step's gradients."""
    return jax.tree.map(lambda x: x[t], stacked)


def train(tx, params, stacked, losses, state=None, jit=True):
    """Parameters and state after all steps, one call of `update` each."""

    def step(params, state, grads, loss):
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    state = tx.init(params) if state is None else state
    for t in range(len(losses)):
        params, state = step(params, state, at(stacked, t), losses[t])
    return params, state


def assert_close(got, want, ulps=64):
    """Floating leaves within `ulps` roundings of their dtype, everything else equal.

    XLA contracts and orders sums as it likes, program by program: a reduction of n terms differs by
    about sqrt(n) roundings, and each step adds a few.
    """

    def check(a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if jnp.issubdtype(a.dtype, jnp.floating):
            eps = float(jnp.finfo(a.dtype).eps)
            a, b = a.astype(np.float64), b.astype(np.float64)
            np.testing.assert_allclose(a, b, rtol=ulps * eps, atol=ulps * eps)
        else:
            np.testing.assert_array_equal(a, b)

    jax.tree.map(check, got, want)


def assert_same(got, want):
    """Every leaf the same bits and dtype."""

    def check(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree.map(check, got, want)
