"""The cart and its pole move as gymnasium's, and can be learned."""

import itertools

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks._jax import training
from benchmarks._jax.workloads import cartpole
from benchmarks._runs import Task
from benchmarks.workloads import load


@pytest.mark.slow
def test_adamw_learns_to_balance_the_pole():
    runs = [Task("cartpole", "adamw", 3e-3, seed, 100, (100,)) for seed in range(3)]
    records = training.train(runs)
    # An untrained policy falls within about 20 of the 500 steps.
    assert min(record.start for record in records) > 0.9
    assert np.mean([record.held_out[-1] for record in records]) < 0.5


def gymnasiums():
    return gymnasium.make("CartPole-v1").unwrapped


@jax.jit
@jax.vmap
def moved(state, action):
    """The state after, and whether it ends the episode."""
    after = cartpole.ENVIRONMENT.transition(state, action, None, cartpole.POLE)
    return after, cartpole.ENVIRONMENT.terminal(after, None, cartpole.POLE)


def test_the_cart_moves_as_gymnasiums():
    rng = np.random.default_rng(0)
    reach = np.array([2.5, 2.0, 0.22, 2.0])  # a little beyond where an episode ends
    states = rng.uniform(-reach, reach, (300, 4)).astype(np.float32)
    actions = rng.integers(2, size=300)
    environment = gymnasiums()
    environment.reset(seed=0)
    want, over = [], []
    for state, action in zip(states, actions, strict=True):
        environment.state = state.astype(np.float64)
        environment.steps_beyond_terminated = None
        observation, _, terminated, _, _ = environment.step(action)
        want.append(observation)
        over.append(terminated)
    got, fallen = moved(states, actions)
    # Some twenty roundings in a row, of numbers up to 4.
    np.testing.assert_allclose(got, want, rtol=0, atol=20 * 4 * 2.0**-23)
    assert 30 < sum(over) < 270
    np.testing.assert_array_equal(fallen, over)
    assert gymnasium.spec("CartPole-v1").max_episode_steps == cartpole.LIMIT


def test_carts_start_where_gymnasiums_do():
    starts = np.asarray(cartpole.start(jax.random.key(0), 1000))
    environment = gymnasiums()
    theirs = np.array([environment.reset(seed=seed)[0] for seed in range(1000)])
    assert np.abs(starts).max() <= 0.05
    np.testing.assert_allclose(starts.std(0), theirs.std(0), rtol=0.1)


def pushing_right(params):
    """Parameters of an agent that always pushes to the right."""
    params = jax.tree.map(jnp.zeros_like, params)
    params["policy"]["bias"] = params["policy"]["bias"].replace(jnp.array([-1e3, 1e3]))
    return params


def test_held_out_figure_of_cartpole_counts_the_steps_gymnasium_counts():
    workload = load("cartpole")
    figure = jax.jit(workload.held_out)(pushing_right(workload.init(0)))
    environment, lengths = gymnasiums(), []
    for seed in range(200):
        environment.reset(seed=seed)
        lengths.append(next(n for n in itertools.count(1) if environment.step(1)[2]))
    # The mean of 64 episodes: four standard errors.
    error = 4 * np.std(lengths) / 8
    assert (1 - figure) * cartpole.LIMIT == pytest.approx(np.mean(lengths), abs=error)


def test_carts_that_fall_start_anew_and_others_go_on():
    workload = load("cartpole")
    graph = nnx.graphdef(cartpole.Agent(rngs=nnx.Rngs(0)))
    attempt = jax.jit(lambda p: cartpole.attempt(nnx.merge(graph, p), jax.random.key(0)))
    states, actions, fallen = map(np.asarray, attempt(workload.init(0)))
    before, after = states[:-1].reshape(-1, 4), states[1:].reshape(-1, 4)
    expected, fallen = np.asarray(moved(before, actions.reshape(-1))[0]), fallen.reshape(-1)
    assert 10 < fallen.sum() < 100
    np.testing.assert_allclose(after[~fallen], expected[~fallen], rtol=0, atol=20 * 4 * 2.0**-23)
    assert np.abs(after[fallen]).max() <= 0.05
    assert np.abs(expected[fallen]).max(1).min() > 0.05


def test_returns_stop_at_the_end_of_an_episode():
    fallen = jnp.array([[False], [True], [False], [False]])
    got = cartpole.returns(fallen, jnp.array([0.5]))[:, 0]
    decay = cartpole.DISCOUNT
    want = np.array(
        [1 + decay, 1.0, 1 + decay + 0.5 * decay**2 / (1 - decay), 1 + 0.5 * decay / (1 - decay)]
    )
    np.testing.assert_allclose(got, (1 - decay) * want, rtol=8 * 2.0**-23)
