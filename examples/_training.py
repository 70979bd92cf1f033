"""One training run of the GPT in JAX: compiled in chunks of steps, one look at the device each."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from _data import Corpus, validation_windows
from _demo import VALIDATION_WINDOWS, GPTConfig, Trained, chunks
from _gpt import GPT


def train(
    tx: optax.GradientTransformation,
    corpus: Corpus,
    config: GPTConfig,
    *,
    steps: int,
    batch: int,
    seed: int,
    read: Callable[[Any], Mapping[str, jax.Array]],
    watch: Callable[[int, Mapping[str, np.ndarray]], None],
    averaged: Callable[[Any, Any], Any] | None = None,
) -> Trained:
    """Trains a new model.

    Args:
        tx: the optimizer; the loss is passed to it as `value`.
        corpus: the text.
        config: the shape of the model.
        steps: training steps, at least 1.
        batch: windows in a batch.
        seed: of the initial weights and of the batches; equal seeds give equal ones.
        read: takes the optimizer's state and gives scalars by name, inside the compiled step.
        watch: called after each chunk with the steps taken so far and the chunk's readings, one
            array each.
        averaged: takes the optimizer's state and the parameters and gives those to evaluate;
            `None` evaluates the parameters themselves.

    Returns:
        The trained parameters and what was seen on the way.
    """
    model = GPT(config, len(corpus.characters), rngs=nnx.Rngs(seed))
    graph, params = nnx.split(model, nnx.Param)
    tx = optax.with_extra_args_support(tx)

    def evaluated(carry: Any) -> Any:
        params, opt_state = carry
        return params if averaged is None else averaged(opt_state, params)

    def step(carry: Any, windows: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        params, opt_state = carry
        value, grads = jax.value_and_grad(loss, argnums=1)(graph, params, windows)
        updates, opt_state = tx.update(grads, opt_state, params, value=value)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), {**read(opt_state), "loss": value}

    @functools.partial(jax.jit, donate_argnums=0)
    def take_steps(carry: Any, windows: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        return jax.lax.scan(step, carry, windows)

    held_out = validation_windows(corpus.validation, config.context, VALIDATION_WINDOWS)
    compiled: dict[int, Any] = {}
    readings: list[Mapping[str, np.ndarray]] = []
    validation: list[tuple[int, float]] = []
    seconds: list[float] = []
    carry = params, tx.init(params)
    for taken, windows, validate in chunks(corpus, config, steps=steps, batch=batch, seed=seed):
        size = len(windows)
        if size not in compiled:
            compiled[size] = take_steps.lower(carry, windows).compile()
        start = time.perf_counter()
        carry, chunk = compiled[size](carry, windows)
        chunk = jax.device_get(chunk)
        seconds.append((time.perf_counter() - start) / size)
        readings.append(chunk)
        watch(taken, chunk)
        if validate:
            value = validation_loss(graph, evaluated(carry), held_out, batch=batch)
            validation.append((taken, float(value)))
    params, opt_state = evaluated(carry), carry[1]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state))

    def continued(prompt: np.ndarray, length: int) -> np.ndarray:
        key = jax.random.key(seed)
        return np.asarray(sample(graph, params, jnp.asarray(prompt), key, length=length))

    return Trained(
        parameters=parameters,
        telemetry={key: np.concatenate([part[key] for part in readings]) for key in readings[0]},
        validation=validation,
        # The first chunk warms the machine up.
        seconds_per_step=statistics.median(seconds[1:] or seconds),
        state_bytes_per_parameter=state_bytes / parameters,
        sample=continued,
    )


def loss(graph: nnx.GraphDef, params: nnx.State, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats per character of int32 `windows`, `(batch, context + 1)`."""
    logits = nnx.merge(graph, params)(windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


@functools.partial(jax.jit, static_argnames=("graph", "batch"))
def validation_loss(
    graph: nnx.GraphDef, params: nnx.State, windows: jax.Array, *, batch: int
) -> jax.Array:
    """`loss` over all `windows`, `batch` of them at a time."""

    def one(window: jax.Array) -> jax.Array:
        return loss(graph, params, window[None])

    return jax.lax.map(one, windows, batch_size=batch).mean()


@functools.partial(jax.jit, static_argnames=("graph", "length"))
def sample(
    graph: nnx.GraphDef,
    params: nnx.State,
    prompt: jax.Array,
    key: jax.Array,
    *,
    length: int,
    temperature: float = 0.8,
) -> jax.Array:
    """Continues a text, one token after the other.

    Args:
        graph: the structure of the model.
        params: its parameters.
        prompt: int32, shape `(context,)`.
        key: the source of randomness.
        length: how many tokens to add.
        temperature: divides the logits; below 1 the likely becomes more likely.

    Returns:
        The new tokens, int32, shape `(length,)`.
    """
    model = nnx.merge(graph, params)

    def add_one(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        token = jax.random.categorical(key, model(window[None])[0, -1] / temperature)
        token = token.astype(window.dtype)
        return jnp.append(window[1:], token), token

    return jax.lax.scan(add_one, prompt, jax.random.split(key, length))[1]
