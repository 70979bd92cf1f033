"""Meta3 in an `optax.chain` in a Flax `TrainState`, with its telemetry logged.

It is written as JSON lines and for TensorBoard: `tensorboard --logdir demo-output/train-state`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from tensorboardX import SummaryWriter

import cruxy_optax

STEPS = 300


class LossTrainState(TrainState):
    """A `TrainState` that tells its optimizer the loss.

    Meta3 works in a plain `TrainState` as well. That one cannot pass the loss on, so the curvature
    stays 0.
    """

    def apply_gradients(self, *, grads: optax.Updates, value: jax.Array) -> "LossTrainState":
        """The state one step on; `value` is the loss, shape `()`."""
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(grads, self.opt_state, self.params, value=value)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state)


class Classifier(nn.Module):
    """Two hidden layers of 32."""

    @nn.compact
    def __call__(self, points: jax.Array) -> jax.Array:
        """Logits, shape `(n,)`, of which class each of the `points`, `(n, 2)`, belongs to."""
        hidden = nn.tanh(nn.Dense(32)(points))
        hidden = nn.tanh(nn.Dense(32)(hidden))
        return nn.Dense(1)(hidden)[:, 0]


def spirals(key: jax.Array, count: int = 512) -> tuple[jax.Array, jax.Array]:
    """Points of two interleaved spirals, shape `(count, 2)`, and their classes, 0 or 1."""
    labels = jnp.arange(count) % 2
    radius = jnp.sqrt(jax.random.uniform(key, (count,)))
    angle = 6.0 * radius + jnp.pi * labels
    points = radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return points, labels


@jax.jit
def train_step(
    state: LossTrainState, points: jax.Array, labels: jax.Array
) -> tuple[LossTrainState, dict[str, jax.Array]]:
    """One step; the second result is the controller's telemetry."""

    def loss_fn(params: optax.Params) -> jax.Array:
        logits = state.apply_fn({"params": params}, points)
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    state = state.apply_gradients(grads=grads, value=loss)
    return state, cruxy_optax.telemetry(state)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, and writes the telemetry as JSON lines and for TensorBoard."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output/train-state"), help="directory to write to"
    )
    output = parser.parse_args(argv).output

    points, labels = spirals(jax.random.key(0))
    model = Classifier()
    # After meta3(), not before it: the controller is to see the raw gradient.
    tx = optax.chain(cruxy_optax.meta3(learning_rate=3e-3), optax.clip(0.01))
    params = model.init(jax.random.key(1), points)["params"]
    state = LossTrainState.create(apply_fn=model.apply, params=params, tx=tx)

    with (
        SummaryWriter(str(output)) as writer,
        cruxy_optax.TelemetryLog(output / "telemetry.jsonl", writer=writer) as log,
    ):
        for step in range(1, STEPS + 1):
            state, telemetry = train_step(state, points, labels)
            log.log(step, telemetry)
            if step % 100 == 0:
                print(f"step {step}  loss {telemetry['loss']:.4f}")
    print(f"Telemetry is in {output}/")


if __name__ == "__main__":
    main()
