"""Fine-tuning: a vision transformer that reads digits learns to read them lying on their side.

A run starts from weights that have learned, here in `init`, from the upright training images, and
goes on with few of the same images turned by a quarter. What is held out is never seen either way.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from benchmarks.workloads import Workload
from benchmarks.workloads.digits import BATCH, CLASSES, Batch, digits, split

PRETRAINING = {"steps": 440, "peak_rate": 1e-2, "weight_decay": 0.1}
"""AdamW with warm-up and cosine, on the upright images; about twenty epochs."""

EACH = 20
"""Turned images of every digit to train on."""

TURNED_BATCH = 40
EPOCHS = 40


def turned(batch: Batch) -> Batch:
    """The images of a batch turned by a quarter, and its digits."""
    images, labels = batch
    return np.rot90(images, axes=(1, 2)).copy(), labels


def few() -> Batch:
    """The first `EACH` training images of every digit, turned."""
    images, labels = split().train
    chosen = np.concatenate([np.flatnonzero(labels == digit)[:EACH] for digit in range(CLASSES)])
    return turned((images[chosen], labels[chosen]))


@functools.cache
def finetuning() -> Workload:
    """The ViT of `digits`; pretraining and the order of the images follow from the run's seed."""
    vit, upright = digits("vit"), split().train
    held_out, (images, labels) = turned(split().held_out), few()
    per_epoch = len(labels) // TURNED_BATCH

    @jax.jit
    def init(seed: Any) -> nnx.State:
        steps, peak = PRETRAINING["steps"], PRETRAINING["peak_rate"]
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)
        tx = optax.adamw(schedule, weight_decay=PRETRAINING["weight_decay"])
        params = vit.init(seed)

        def step(carry: tuple, key: jax.Array) -> tuple[tuple, None]:
            params, state = carry
            drawn = jax.random.randint(key, (BATCH,), 0, len(upright[1]))
            batch = jax.tree.map(lambda x: jnp.asarray(x)[drawn], upright)
            updates, state = tx.update(jax.grad(vit.loss)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), steps)
        return lax.scan(step, (params, tx.init(params)), keys)[0][0]

    def batches(seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng(seed)
        while True:
            for drawn in rng.permutation(len(labels)).reshape(-1, TURNED_BATCH):
                yield images[drawn], labels[drawn]

    return Workload(
        name="finetuning",
        steps=EPOCHS * per_epoch,
        unit="held-out loss on turned digits (nats per image)",
        init=init,
        loss=vit.loss,
        batches=batches,
        held_out=lambda params: vit.loss(params, held_out),
        settings={
            "data": "scikit-learn's digits, turned by a quarter",
            "model": "vit",
            "pretraining": PRETRAINING,
            "train": len(labels),
            "held_out": len(held_out[1]),
            "batch": TURNED_BATCH,
            "epochs": EPOCHS,
        },
    )
