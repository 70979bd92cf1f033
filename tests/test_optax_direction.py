"""A direction that this library does not have, written as a user would: all the rest works with it.

It is that of the page "Write a direction of your own".
"""

import inspect
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cruxy_control import Meta3, SelfDriving, betas
from cruxy_optax import (
    LayerStack,
    average_iterates,
    averaged_params,
    clip_by_predicted_norm,
    quantize_state,
    release_gradients,
    scale_by_meta_learning_rate,
    stabilize,
    telemetry,
    throttle_by_phase,
)
from optimizers import assert_close, assert_same
from relatives import crossed

PAGE = Path(__file__).parent.parent / "docs" / "direction.md"


class ScaleBySignBlendState(NamedTuple):
    """A momentum, and what it decayed by."""

    mu: optax.Updates  # like the parameters; float32
    beta1: jax.Array  # this step's; float32

    held_by_controls = True
    telemetry = ("beta1",)

    @property
    def first_moment(self):
        """What SelfDriving compares the gradient with."""
        return self.mu


def scale_by_sign_blend(b1=0.9):
    """Half the sign of the momentum, half the momentum at a root mean square of 1."""

    def init_fn(params):
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)
        return ScaleBySignBlendState(mu, jnp.ones(()))

    def update_fn(grads, state, params=None, *, controls, **extra_args):
        beta1, _ = betas(controls, b1, 0.0, xp=jnp)
        mu = jax.tree.map(lambda m, g: beta1 * m + (1.0 - beta1) * g, state.mu, grads)
        return jax.tree.map(blend, mu), ScaleBySignBlendState(mu, beta1)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def blend(m):
    """sign(m) / 2 + m / rms(m) / 2, of one tensor."""
    return jnp.sign(m) / 2 + m / (jnp.sqrt(jnp.mean(m * m)) + 1e-12) / 2


@pytest.mark.parametrize("thing", [ScaleBySignBlendState, scale_by_sign_blend, blend])
def test_page_shows_the_code_that_is_tested_here(thing):
    assert inspect.getsource(thing) in PAGE.read_text("utf-8")


def controlled(law, direction, power=16.0):
    return stabilize(
        optax.chain(
            clip_by_predicted_norm(),
            direction,
            optax.add_decayed_weights(1e-4),
            throttle_by_phase(),
            scale_by_meta_learning_rate(1e-2, relative_limit=0.1),
            average_iterates(power),
        ),
        law,
    )


every_law = pytest.mark.parametrize("law", [Meta3(), SelfDriving()], ids=["meta3", "self_driving"])
DIRECTIONS = [scale_by_sign_blend(), quantize_state(scale_by_sign_blend(), 8)]
every_width = pytest.mark.parametrize("direction", DIRECTIONS, ids=["float32", "8 bits"])
each_law_in_one_width = pytest.mark.parametrize(
    ("law", "direction"),
    crossed([Meta3(), SelfDriving()], DIRECTIONS),
    ids=[f"{law}-{width}" for law in ("meta3", "self_driving") for width in ("float32", "8 bits")],
)
TARGET = {
    "w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32),
    "b": jnp.array([1.0, -2.0, 0.5]),
}


def gradient(params, t):
    """That of a bowl, of another depth in each tensor, with noise."""
    keys = dict(zip(params, jax.random.split(jax.random.key(t), len(params)), strict=True))
    return {
        k: depth * (params[k] - TARGET[k] + 0.1 * jax.random.normal(keys[k], params[k].shape))
        for k, depth in (("w", 3.0), ("b", 0.2))
    }


def train(tx, steps, params=None, state=None, start=0):
    params = jax.tree.map(jnp.ones_like, TARGET) if params is None else params
    state = tx.init(params) if state is None else state

    @jax.jit
    def step(params, state, t):
        updates, state = tx.update(gradient(params, t), state, params, value=1.0)
        return optax.apply_updates(params, updates), state

    for t in range(start, start + steps):
        params, state = step(params, state, t)
    return params, state


@every_law
def test_update_is_the_direction_at_the_controllers_rate(law):
    tx, params = controlled(law, scale_by_sign_blend()), jax.tree.map(jnp.ones_like, TARGET)
    grads = gradient(params, 0)
    updates, state = tx.update(grads, tx.init(params), params)
    rate = telemetry(state)["learning_rate"]
    g = np.asarray(grads["b"])
    want = -rate * (np.sign(g) / 2 + g / np.sqrt(np.mean(g**2)) / 2 + 1e-4)
    np.testing.assert_allclose(updates["b"], want, rtol=1e-5)


@each_law_in_one_width
def test_average_of_a_run_is_nearer_to_the_target_than_a_noisy_gradient_points(law, direction):
    params, state = train(controlled(law, direction), 400)
    average = averaged_params(state, params)
    error = {k: float(jnp.sqrt(jnp.mean((average[k] - TARGET[k]) ** 2))) for k in TARGET}
    assert max(error.values()) < 0.1


@each_law_in_one_width
def test_run_goes_on_from_a_checkpoint_bit_for_bit(law, direction):
    tx = controlled(law, direction)
    params, state = train(tx, 5)
    saved = [np.asarray(leaf) for leaf in jax.tree.leaves((params, state))]
    structure = jax.tree.structure((params, tx.init(params)))
    resumed = train(tx, 5, *structure.unflatten(map(jnp.asarray, saved)), start=5)
    assert_same(resumed, train(tx, 10))


@every_law
def test_average_of_power_zero_is_the_mean_of_the_parameters(law):
    tx = controlled(law, scale_by_sign_blend(), power=0.0)
    params, state, seen = None, None, []
    for t in range(4):
        params, state = train(tx, 1, params, state, t)
        seen.append(params)
    mean = jax.tree.map(lambda *xs: sum(xs) / len(xs), *seen)
    assert_close(averaged_params(state, params), mean)


@each_law_in_one_width
def test_gradient_that_is_not_finite_changes_no_bit(law, direction):
    tx = controlled(law, direction)
    params, state = train(tx, 5)
    bad = gradient(params, 5) | {"b": jnp.array([1.0, jnp.nan, 1.0])}
    updates, after = tx.update(bad, state, params, value=1.0)
    assert int(after.skipped_total) == 1
    assert_same(optax.apply_updates(params, updates), params)
    for before, now in ((state.law_state, after.law_state), (moments(state), moments(after))):
        assert_same(now, before)


def moments(state):
    """What the direction remembers, in codes where it is coded; the rate used is none of it."""
    own = state.inner_state[1]
    return getattr(own, "inner_state", own).mu


@each_law_in_one_width
def test_telemetry_shows_its_beta1_and_no_beta2(law, direction):
    state = train(controlled(law, direction), 3)[1]
    shown = telemetry(state)
    own = state.inner_state[1]
    assert shown["beta1"] == getattr(own, "inner_state", own).beta1
    assert "beta2" not in shown


@every_width
def test_law_steers_by_its_momentum(direction):
    tx = controlled(SelfDriving(), direction)
    params, state = train(tx, 3)
    grads, before = gradient(params, 3), moments(state)
    m = jax.tree.map(
        lambda m: m.decode() if hasattr(m, "decode") else m,
        before,
        is_leaf=lambda node: hasattr(node, "decode"),
    )
    _, state = tx.update(grads, state, params)
    g, m = (np.concatenate([np.ravel(tree[k]) for k in TARGET]) for tree in (grads, m))
    cosine = g @ m / np.linalg.norm(g) / np.linalg.norm(m)
    assert float(state.signals.alignment) == pytest.approx(cosine, rel=1e-4)


@every_width
def test_its_gradients_can_be_released(direction):
    # A law that orders nothing: what it ordered a step before is what it orders now.
    law = Meta3(
        clip_threshold=None,
        phase_strength=0.0,
        rate_gain=0.0,
        beta1_gain=0.0,
        beta2_gain=0.0,
        beta2_phase_strength=0.0,
    )
    tx = stabilize(optax.chain(direction, scale_by_meta_learning_rate(1e-2)), law)

    def loss_of(params, batch):
        x = batch @ params.embed
        for layer in params.layers:
            x = x + jnp.tanh(x @ layer)
        return jnp.mean((x @ params.head - 1.0) ** 2)

    rng = np.random.default_rng(1)
    shapes = LayerStack(embed=(3, 64), layers=(4, 64, 64), head=(64, 1))
    params = LayerStack(*(jnp.asarray(0.1 * rng.normal(size=s), jnp.float32) for s in shapes))
    batch = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    released = release_gradients(
        tx,
        lambda embed, batch: batch @ embed,
        lambda layer, x, batch: x + jnp.tanh(x @ layer),
        lambda head, embed, x, batch: jnp.mean((x @ head - 1.0) ** 2),
    )
    got, _, _ = jax.jit(released.step)(params, released.init(params), batch)
    apart = params._replace(layers=list(params.layers))  # as tensors of their own, of their own rms
    grads = jax.grad(loss_of)(apart, batch)
    want = optax.apply_updates(apart, tx.update(grads, tx.init(apart), apart)[0])
    assert_close(got, want._replace(layers=jnp.stack(want.layers)))
