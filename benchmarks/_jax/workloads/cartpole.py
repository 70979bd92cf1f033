"""A policy gradient on CartPole: a network learns to balance a pole from its own attempts.

The environment is gymnasium's, in its functional JAX form, so that a whole attempt is compiled. It
needs the packages gymnasium, jax and flax, and neither gymnasium's extras nor a display.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from gymnasium.envs.phys2d.cartpole import CartPoleFunctional, CartPoleParams

from benchmarks.workloads import Workload

ENVIRONMENT = CartPoleFunctional()

# The functional form of gymnasium 1.4.0 adds mass and length of the pole where CartPole-v1
# multiplies them.
POLE = CartPoleParams(polemass_length=CartPoleParams.masspole * CartPoleParams.length)

LIMIT = 500
"""Steps after which CartPole-v1 ends an episode, and so the largest return."""

BUDGET = 100_000
"""Environment steps of a run."""

CARTS = 2
WINDOW = 250
"""Environment steps that every cart takes for one step of the optimizer."""

EPISODES = 64
"""Held-out ones."""

DISCOUNT = 0.99
ENTROPY_WEIGHT = 0.01
VALUE_WEIGHT = 0.5

# Cart and pole stay within the first and third, and seldom leave the others.
SCALE = np.array([POLE.x_threshold, 2.0, POLE.theta_threshold_radians, 2.0], np.float32)


class Agent(nnx.Module):
    """Two hidden layers, a policy over both pushes, and an estimate of what is still to come.

    Args:
        width: units of a hidden layer.
        rngs: draws the initial weights.
    """

    def __init__(self, width: int = 32, *, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        # Near zero, so that at first both pushes are about equally likely.
        small = jax.nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
        self.policy = nnx.Linear(width, 2, kernel_init=small, rngs=rngs)
        self.value = nnx.Linear(width, 1, kernel_init=small, rngs=rngs)

    def __call__(self, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities, shape `(..., 2)`, and values, `(...)`, of `states`, `(..., 4)`."""
        x = jnp.tanh(self.second(jnp.tanh(self.first(states / SCALE))))
        return jax.nn.log_softmax(self.policy(x)), self.value(x)[..., 0]


def start(key: jax.Array, carts: int) -> jax.Array:
    """First states of new episodes, shape `(carts, 4)`."""
    return jax.vmap(lambda key: ENVIRONMENT.initial(key, POLE))(jax.random.split(key, carts))


def act(agent: Agent, states: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
    """One step of every cart.

    Args:
        agent: draws the actions from its policy.
        states: shape `(carts, 4)`.
        key: the source of randomness.

    Returns:
        Actions, 0 or 1, shape `(carts,)`; the states they lead to; whether the episode is over.
    """
    actions = jax.random.categorical(key, agent(states)[0])
    moved = jax.vmap(lambda s, a: ENVIRONMENT.transition(s, a, None, POLE))(states, actions)
    return actions, moved, jax.vmap(lambda s: ENVIRONMENT.terminal(s, None, POLE))(moved)


def attempt(agent: Agent, key: jax.Array) -> tuple[jax.Array, ...]:
    """`WINDOW` steps of every cart, which starts anew whenever it falls.

    Returns:
        States, shape `(WINDOW + 1, carts, 4)`; actions and whether the step ended an episode, both
        `(WINDOW, carts)`.
    """
    keys = jax.random.split(key, WINDOW + 1)

    def step(states: jax.Array, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        action_key, start_key = jax.random.split(key)
        actions, moved, fallen = act(agent, states, action_key)
        following = jnp.where(fallen[:, None], start(start_key, CARTS), moved)
        return following, (states, actions, fallen)

    last, (states, actions, fallen) = jax.lax.scan(step, start(keys[0], CARTS), keys[1:])
    return jnp.concatenate([states, last[None]]), actions, fallen


def returns(fallen: jax.Array, last: jax.Array) -> jax.Array:
    """Discounted sums of rewards to the end of the episode, as a share of an endless episode's.

    Every step earns 1, the one that ends the episode too.

    Args:
        fallen: whether a step ended an episode, shape `(steps, carts)`.
        last: what is expected after the last step, shape `(carts,)`, as such a share.
    """

    def back(following: jax.Array, fallen: jax.Array) -> tuple[jax.Array, jax.Array]:
        share = 1 - DISCOUNT + DISCOUNT * jnp.where(fallen, 0.0, following)
        return share, share

    return jax.lax.scan(back, last, fallen, reverse=True)[1]


@functools.cache
def cartpole() -> Workload:
    """REINFORCE with a learned baseline (Williams 1992; Mnih et al. 2016) and an entropy bonus.

    A batch is a seed: the loss lets the policy act, and its gradient is the policy gradient. The
    loss itself means little, since the better the policy, the longer the attempts it is taken on.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: Agent(rngs=nnx.Rngs(0))))

    @jax.jit
    def init(seed: int | jax.Array) -> nnx.State:
        return nnx.state(Agent(rngs=nnx.Rngs(jax.random.key(seed))), nnx.Param)

    def loss(params: nnx.State, seed: jax.Array) -> jax.Array:
        acting = nnx.merge(graph, jax.lax.stop_gradient(params))
        states, actions, fallen = attempt(acting, jax.random.key(seed))
        policy, values = nnx.merge(graph, params)(states[:-1])
        reached = returns(fallen, acting(states[-1])[1])
        advantage = reached - jax.lax.stop_gradient(values)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
        chosen = jnp.take_along_axis(policy, actions[..., None], -1)[..., 0]
        entropy = -(jnp.exp(policy) * policy).sum(-1)
        baseline = jnp.square(values - reached)
        return jnp.mean(VALUE_WEIGHT * baseline - chosen * advantage - ENTROPY_WEIGHT * entropy)

    def batches(seed: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(seed)
        while True:
            yield np.asarray(rng.integers(2**32, dtype=np.uint32))

    def held_out(params: nnx.State) -> jax.Array:
        agent = nnx.merge(graph, params)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 1), LIMIT + 1)

        def step(
            carry: tuple[jax.Array, ...], key: jax.Array
        ) -> tuple[tuple[jax.Array, ...], None]:
            states, standing, steps = carry
            _, states, fallen = act(agent, states, key)
            return (states, standing & ~fallen, steps + standing), None

        nothing = jnp.zeros(EPISODES, jnp.int32)
        carry = start(keys[0], EPISODES), nothing == 0, nothing
        steps = jax.lax.scan(step, carry, keys[1:])[0][2]
        return (LIMIT - steps).mean() / LIMIT

    return Workload(
        name="cartpole",
        steps=BUDGET // (CARTS * WINDOW),
        unit=f"1 - mean return / {LIMIT}",
        init=init,
        loss=loss,
        batches=batches,
        held_out=held_out,
        settings={
            "data": "gymnasium's CartPole-v1",
            "environment_steps": BUDGET,
            "carts": CARTS,
            "window": WINDOW,
            "episodes_held_out": EPISODES,
            "discount": DISCOUNT,
            "entropy_weight": ENTROPY_WEIGHT,
            "value_weight": VALUE_WEIGHT,
        },
    )
