"""A classifier in Equinox, trained without a learning rate.

`eqx.filter` leaves the arrays of a module, which are what the optimizer is given. The average is
a tree of arrays like them; `eqx.combine` makes a module of it and of what is no array.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import cruxy_optax
from _spirals import spirals

STEPS = 400

tx = cruxy_optax.self_driving()


def loss_fn(model: eqx.nn.MLP, points: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy."""
    logits = jax.vmap(model)(points)
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean()


@eqx.filter_jit
def train_step(
    model: eqx.nn.MLP, opt_state: Any, points: jax.Array, labels: jax.Array
) -> tuple[eqx.nn.MLP, Any, jax.Array]:
    """One step; the loss is that before it."""
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, points, labels)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = tx.update(grads, opt_state, params, value=loss)
    return eqx.apply_updates(model, updates), opt_state, loss


def main() -> None:
    """Trains, and prints the loss of the parameters and of their average."""
    points, labels = map(jnp.asarray, spirals())
    unseen = tuple(map(jnp.asarray, spirals(seed=1)))
    model = eqx.nn.MLP(
        in_size=2,
        out_size="scalar",
        width_size=32,
        depth=2,
        activation=jnp.tanh,
        key=jax.random.key(0),
    )
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    for step in range(1, STEPS + 1):
        model, opt_state, loss = train_step(model, opt_state, points, labels)
        if step % 100 == 0:
            rate = cruxy_optax.telemetry(opt_state)["learning_rate"]
            print(f"step {step}  loss {loss:.4f}  rate found {rate:.1e}")
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    averaged: Any = eqx.combine(cruxy_optax.averaged_params(opt_state, params), rest)
    print(f"unseen points, parameters  loss {loss_fn(model, *unseen):.4f}")
    print(f"unseen points, average     loss {loss_fn(averaged, *unseen):.4f}")


if __name__ == "__main__":
    main()
