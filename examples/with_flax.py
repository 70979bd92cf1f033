"""A classifier in Flax nnx, trained without a learning rate.

`nnx.Optimizer.update` hands keyword arguments on, so that the loss arrives; the average of the
parameters is a state like that of the model, which `nnx.merge` makes a model of.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import cruxy_optax
from _spirals import spirals

STEPS = 400


class Classifier(nnx.Module):
    """Two hidden layers of 32; logits of shape `(n,)`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(2, 32, rngs=rngs)
        self.second = nnx.Linear(32, 32, rngs=rngs)
        self.last = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, points: jax.Array) -> jax.Array:
        """The logits of `points`, shape `(n, 2)`."""
        hidden = nnx.tanh(self.second(nnx.tanh(self.first(points))))
        return self.last(hidden)[:, 0]


def loss_fn(model: Classifier, points: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy."""
    return optax.sigmoid_binary_cross_entropy(model(points), labels).mean()


@nnx.jit
def train_step(
    model: Classifier, optimizer: nnx.Optimizer, points: jax.Array, labels: jax.Array
) -> jax.Array:
    """One step; returns the loss before it."""
    loss, grads = nnx.value_and_grad(loss_fn)(model, points, labels)
    optimizer.update(model, grads, value=loss)
    return loss


def main() -> None:
    """Trains, and prints the loss of the parameters and of their average."""
    points, labels = map(jnp.asarray, spirals())
    unseen = tuple(map(jnp.asarray, spirals(seed=1)))
    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, cruxy_optax.self_driving(), wrt=nnx.Param)
    for step in range(1, STEPS + 1):
        loss = train_step(model, optimizer, points, labels)
        if step % 100 == 0:
            rate = cruxy_optax.telemetry(optimizer.opt_state)["learning_rate"]
            print(f"step {step}  loss {loss:.4f}  rate found {rate:.1e}")
    graph, params = nnx.split(model)
    averaged = nnx.merge(graph, cruxy_optax.averaged_params(optimizer.opt_state, params))
    print(f"unseen points, parameters  loss {loss_fn(model, *unseen):.4f}")
    print(f"unseen points, average     loss {loss_fn(averaged, *unseen):.4f}")


if __name__ == "__main__":
    main()
