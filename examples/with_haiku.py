"""A classifier in Haiku, trained without a learning rate.

The parameters of a transformed function are a dictionary, so that nothing is special about them.
"""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import optax

import cruxy_optax
from _spirals import spirals

STEPS = 400

tx = cruxy_optax.self_driving()


@hk.without_apply_rng
@hk.transform
def classifier(points: jax.Array) -> jax.Array:
    """Two hidden layers of 32; logits of shape `(n,)`."""
    return hk.nets.MLP([32, 32, 1], activation=jnp.tanh)(points)[:, 0]


def loss_fn(params: Any, points: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy."""
    logits = classifier.apply(params, points)
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean()


@jax.jit
def train_step(
    params: Any, opt_state: Any, points: jax.Array, labels: jax.Array
) -> tuple[Any, Any, jax.Array]:
    """One step; the loss is that before it."""
    loss, grads = jax.value_and_grad(loss_fn)(params, points, labels)
    updates, opt_state = tx.update(grads, opt_state, params, value=loss)
    return optax.apply_updates(params, updates), opt_state, loss


def main() -> None:
    """Trains, and prints the loss of the parameters and of their average."""
    points, labels = map(jnp.asarray, spirals())
    unseen = tuple(map(jnp.asarray, spirals(seed=1)))
    params = classifier.init(jax.random.key(0), points)
    opt_state = tx.init(params)
    for step in range(1, STEPS + 1):
        params, opt_state, loss = train_step(params, opt_state, points, labels)
        if step % 100 == 0:
            rate = cruxy_optax.telemetry(opt_state)["learning_rate"]
            print(f"step {step}  loss {loss:.4f}  rate found {rate:.1e}")
    averaged = cruxy_optax.averaged_params(opt_state, params)
    print(f"unseen points, parameters  loss {loss_fn(params, *unseen):.4f}")
    print(f"unseen points, average     loss {loss_fn(averaged, *unseen):.4f}")


if __name__ == "__main__":
    main()
