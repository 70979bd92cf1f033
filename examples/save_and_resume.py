"""Saves a run in JAX with Orbax and goes on with it: the same bits as if it had never stopped.

The state of the optimizer is a pytree, controller and average included.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import cruxy_optax
from _spirals import spirals

tx = cruxy_optax.self_driving()

Run = dict[str, Any]
"""`params` and `opt_state`."""


def start() -> Run:
    """A network with a hidden layer of 32, and the state before the first step."""
    first, last = jax.random.split(jax.random.key(0))
    params = {
        "first": {"w": jax.random.normal(first, (2, 32)), "b": jnp.zeros(32)},
        "last": {"w": jax.random.normal(last, (32,)) / 32**0.5, "b": jnp.zeros(())},
    }
    return {"params": params, "opt_state": tx.init(params)}


@jax.jit
def train_step(run: Run, points: jax.Array, labels: jax.Array) -> tuple[Run, jax.Array]:
    """One step; the loss is that before it."""

    def loss_fn(params: Any) -> jax.Array:
        hidden = jnp.tanh(points @ params["first"]["w"] + params["first"]["b"])
        logits = hidden @ params["last"]["w"] + params["last"]["b"]
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(run["params"])
    updates, opt_state = tx.update(grads, run["opt_state"], run["params"], value=loss)
    params = optax.apply_updates(run["params"], updates)
    return {"params": params, "opt_state": opt_state}, loss


def train(run: Run, steps: int) -> Run:
    """The run after as many steps more."""
    points, labels = map(jnp.asarray, spirals())
    for _ in range(steps):
        run, _ = train_step(run, points, labels)
    return run


def save(run: Run, folder: Path) -> None:
    """Writes a run."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, run)


def load(folder: Path) -> Run:
    """Reads a run; its shapes are those of a run that has not begun."""
    blank = jax.eval_shape(start)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), blank)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder, wanted)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains 100 steps, saves, goes on for 100 in two ways, and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="where to keep the checkpoint (default: not)")
    output = parser.parse_args(argv).output
    with TemporaryDirectory() as scratch:
        folder = (output or Path(scratch) / "checkpoint").absolute()
        halfway = train(start(), 100)
        save(halfway, folder)
        straight = train(halfway, 100)
        resumed = train(load(folder), 100)
    leaves = zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True)
    same = [bool(jnp.array_equal(a, b)) for a, b in leaves]
    print(f"step {int(cruxy_optax.telemetry(resumed['opt_state'])['step'])}")
    print(f"{sum(same)} of {len(same)} arrays are equal, bit for bit")


if __name__ == "__main__":
    main()
