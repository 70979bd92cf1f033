"""scikit-learn's digits: the images, their batches, and what every model of them has in common.

1,797 real images of 8 x 8 pixels, of which a fifth, drawn evenly over the ten digits, is held out.
No augmentation: with 1,437 images a net soon fits them all, so the held-out figure also shows what
an optimizer's steps do to generalisation.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from benchmarks.workloads import Workload

BATCH = 64
EPOCHS = 30
CLASSES = 10
SIDE = 8
PATCH = 4

Batch = tuple[np.ndarray, np.ndarray]
"""Images, float32 in [-1, 1], shape `(batch, 8, 8, 1)`; digits, int32, shape `(batch,)`."""


class Split(NamedTuple):
    """The images as the nets read them; the held-out ones are the same in every run."""

    train: Batch
    held_out: Batch


@functools.cache
def split() -> Split:
    """Loads and splits the data."""
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 8.0 - 1.0).reshape(-1, SIDE, SIDE, 1).astype(np.float32)
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    labels = labels.astype(np.int32)
    return Split((images[train], labels[train]), (images[held_out], labels[held_out]))


def workload(
    model: str,
    *,
    init: Callable[[int], Any],
    loss: Callable[[Any, Batch], Any],
    held_out: Callable[[Any], Any],
) -> Workload:
    """A classifier, of which a framework brings the model and its figures.

    Args:
        model: "conv" or "vit".
        init: as in `Workload`, like those below.
        loss: of a batch.
        held_out: the same of all held-out images.
    """
    data = split()
    per_epoch = len(data.train[1]) // BATCH

    def batches(seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng(seed)
        images, labels = data.train
        while True:
            # What does not fill a batch sits this epoch out.
            for drawn in rng.permutation(len(labels))[: per_epoch * BATCH].reshape(-1, BATCH):
                yield images[drawn], labels[drawn]

    return Workload(
        name=f"digits-{model}",
        steps=EPOCHS * per_epoch,
        unit="held-out loss (nats per image)",
        init=init,
        loss=loss,
        batches=batches,
        held_out=held_out,
        settings={
            "data": "scikit-learn's digits",
            "model": model,
            "train": len(data.train[1]),
            "held_out": len(data.held_out[1]),
            "batch": BATCH,
            "epochs": EPOCHS,
        },
    )
