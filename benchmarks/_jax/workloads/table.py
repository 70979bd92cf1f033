"""Regression on a table in JAX: a multilayer perceptron on Friedman's first function.

scikit-learn bundles no table of real measurements that is large enough to tell optimizers apart, so
the table is the one that its `make_friedman1` generates: `10 sin(pi x1 x2) + 20 (x3 - 1/2)^2 +
10 x4 + 5 x5` and noise of variance 1, with five more columns that say nothing. The table is the
same in every run.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from sklearn.datasets import make_friedman1

from benchmarks._jax.workloads.weights import draw_weights
from benchmarks.workloads import Workload

Batch = tuple[np.ndarray, np.ndarray]
"""Rows, float32, shape `(batch, 10)`; targets, float32, shape `(batch,)`."""

TRAIN = 2048
HELD_OUT = 2048
COLUMNS = 10
NOISE = 1.0
BATCH = 64
EPOCHS = 40
WIDTH = 64


class Table(NamedTuple):
    """Rows and targets in units of the training part's means and standard deviations."""

    train: Batch
    held_out: Batch


@functools.cache
def table_of_friedman() -> Table:
    """Generates and splits the table."""
    rows, targets = make_friedman1(TRAIN + HELD_OUT, COLUMNS, noise=NOISE, random_state=0)
    rows = (rows - rows[:TRAIN].mean(0)) / rows[:TRAIN].std(0)
    targets = (targets - targets[:TRAIN].mean()) / targets[:TRAIN].std()
    rows, targets = rows.astype(np.float32), targets.astype(np.float32)
    return Table((rows[:TRAIN], targets[:TRAIN]), (rows[TRAIN:], targets[TRAIN:]))


class MLP(nnx.Module):
    """Two hidden layers with GELU.

    Args:
        rngs: of the layers; the weights are those of `draw_weights`.
    """

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(COLUMNS, WIDTH, rngs=rngs)
        self.second = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, rows: jax.Array) -> jax.Array:
        """Predictions, shape `(batch,)`."""
        x = jax.nn.gelu(self.second(jax.nn.gelu(self.first(rows))))
        return self.out(x)[:, 0]


@functools.cache
def table(model: str) -> Workload:
    """Weights and the order of the rows are drawn from the run's seed.

    Args:
        model: "mlp".
    """
    data = table_of_friedman()
    kept, variance = data.held_out, float(data.held_out[1].var())
    graph, shapes = nnx.split(nnx.eval_shape(lambda: MLP(rngs=nnx.Rngs(0))))

    def loss(params: nnx.State, batch: Batch) -> jax.Array:
        rows, targets = batch
        return ((nnx.merge(graph, params)(rows) - targets) ** 2).mean()

    def batches(seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng(seed)
        rows, targets = data.train
        while True:
            for drawn in rng.permutation(TRAIN).reshape(-1, BATCH):
                yield rows[drawn], targets[drawn]

    return Workload(
        name=f"table-{model}",
        steps=EPOCHS * (TRAIN // BATCH),
        unit="held-out squared error (variances of the target)",
        init=lambda seed: draw_weights(shapes, seed),
        loss=loss,
        batches=batches,
        held_out=lambda params: loss(params, kept) / variance,
        settings={
            "data": "scikit-learn's make_friedman1",
            "model": model,
            "train": TRAIN,
            "held_out": HELD_OUT,
            "noise": NOISE,
            "width": WIDTH,
            "batch": BATCH,
            "epochs": EPOCHS,
        },
    )
