"""Fine-tuning: models that have learned one thing go on with little data of another.

A vision transformer that reads upright digits learns to read them lying on their side; a language
model that has read Shakespeare learns to write the documentation of data sets, with all its weights
or by low-rank adapters (LoRA, Hu et al. 2021) alone. A run starts from weights that have learned,
here in `init`. What is held out is seen in neither part.
"""

import functools
import hashlib
import importlib.resources
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, traverse_util
from jax import lax

from benchmarks._jax.workloads.digits import digits
from benchmarks._jax.workloads.shakespeare import language_model
from benchmarks.workloads import Workload
from benchmarks.workloads.digits import BATCH, CLASSES, Batch, split

# The demo's own modules, found through the path that the package sets.
from _data import Corpus, encode, shakespeare  # isort: skip
from _demo import MODELS  # isort: skip

PRETRAINING = {
    "vit": {"steps": 440, "peak_rate": 1e-2, "weight_decay": 0.1},
    "gpt": {"steps": 1000, "peak_rate": 3e-3, "weight_decay": 0.1},
}
"""AdamW with warm-up and cosine; about twenty epochs of the upright images, a part of the plays."""

EACH = 20
"""Turned images of every digit to train on."""

TURNED_BATCH = 40
EPOCHS = 40

GPT_STEPS = 280
"""About eight epochs of the documentation."""

RANK = 8
ALPHA = 16
"""Rank of an adapter, and what its product is scaled by, over the rank."""


def turned(batch: Batch) -> Batch:
    """The images of a batch turned by a quarter, and its digits."""
    images, labels = batch
    return np.rot90(images, axes=(1, 2)).copy(), labels


def few() -> Batch:
    """The first `EACH` training images of every digit, turned."""
    images, labels = split().train
    chosen = np.concatenate([np.flatnonzero(labels == digit)[:EACH] for digit in range(CLASSES)])
    return turned((images[chosen], labels[chosen]))


def corpora() -> tuple[np.ndarray, Corpus]:
    """The plays as token ids, and the documentation to go on with, in the characters of both.

    The documentation is what scikit-learn ships about its data sets, in the order of their names;
    the last fifth of it is held out.

    Raises:
        ValueError: if the plays are not there.
    """
    files = importlib.resources.files("sklearn.datasets.descr").iterdir()
    pages = sorted((file for file in files if file.name.endswith(".rst")), key=lambda f: f.name)
    plays, documentation = shakespeare(), "".join(f.read_text(encoding="utf-8") for f in pages)
    both = encode("", plays + documentation)
    tokens = np.concatenate([both.train, both.validation])
    first, second = np.split(tokens, [len(plays)])
    cut = len(second) * 4 // 5
    return first, Corpus("scikit-learn's data sets", both.characters, second[:cut], second[cut:])


def _learned(
    model: Workload, kind: str, draw: Callable[[jax.Array], Any]
) -> Callable[[int], optax.Params]:
    """Seed to weights that have learned; kept, since many runs start from the same.

    Args:
        model: what is trained.
        kind: a key of `PRETRAINING`.
        draw: a random key to a batch.
    """
    steps, peak = int(PRETRAINING[kind]["steps"]), PRETRAINING[kind]["peak_rate"]
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)
    tx = optax.adamw(schedule, weight_decay=PRETRAINING[kind]["weight_decay"])

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, None]:
        params, state = carry
        updates, state = tx.update(jax.grad(model.loss)(params, draw(key)), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def learn(seed: Any) -> optax.Params:
        params = model.init(seed)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), steps)
        return lax.scan(step, (params, tx.init(params)), keys)[0][0]

    @functools.cache
    def init(seed: int) -> optax.Params:
        with jax.ensure_compile_time_eval():  # what is kept must be no tracer
            return learn(seed)

    return init


@functools.cache
def finetuning(kind: str) -> Workload:
    """The ViT of `digits` or the small GPT; what is drawn follows from the run's seed.

    Args:
        kind: a key of `PRETRAINING`, or "lora" for the GPT by adapters.
    """
    return {"vit": _vit, "gpt": _gpt, "lora": _lora}[kind]()


def _vit() -> Workload:
    vit, upright = digits("vit"), split().train
    held_out, (images, labels) = turned(split().held_out), few()

    def draw(key: jax.Array) -> Batch:
        drawn = jax.random.randint(key, (BATCH,), 0, len(upright[1]))
        return jax.tree.map(lambda x: jnp.asarray(x)[drawn], upright)

    def batches(seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng(seed)
        while True:
            for drawn in rng.permutation(len(labels)).reshape(-1, TURNED_BATCH):
                yield images[drawn], labels[drawn]

    return vit._replace(
        name="finetuning-vit",
        steps=EPOCHS * (len(labels) // TURNED_BATCH),
        unit="held-out loss on turned digits (nats per image)",
        init=_learned(vit, "vit", draw),
        batches=batches,
        held_out=lambda params: vit.loss(params, held_out),
        settings={
            "data": "scikit-learn's digits, turned by a quarter",
            "model": "vit",
            "pretraining": PRETRAINING["vit"],
            "train": len(labels),
            "held_out": len(held_out[1]),
            "batch": TURNED_BATCH,
            "epochs": EPOCHS,
        },
    )


def _gpt() -> Workload:
    plays, documentation = corpora()
    config, batch, _ = MODELS["small"]
    gpt = language_model("finetuning-gpt", documentation, config, batch, GPT_STEPS)

    def draw(key: jax.Array) -> jax.Array:
        starts = jax.random.randint(key, (batch, 1), 0, len(plays) - config.context)
        return jnp.asarray(plays)[starts + jnp.arange(config.context + 1)]

    text = np.concatenate([documentation.train, documentation.validation])
    return gpt._replace(
        init=_learned(gpt, "gpt", draw),
        settings=gpt.settings
        | {
            "pretraining": {"data": "the plays of Shakespeare", **PRETRAINING["gpt"]},
            "train": len(documentation.train),
            "held_out": len(documentation.validation),
            # The documentation may change with scikit-learn's version.
            "digest": hashlib.sha256(text.tobytes()).hexdigest()[:16],
        },
    )


def _lora() -> Workload:
    """The GPT of `_gpt` whose blocks learn by adapters; the weights under them are those of seed 0.

    What is trained is `lora_a`, `(inputs, RANK)`, and `lora_b`, `(RANK, outputs)`, of every kernel
    in a block, at that kernel's place; the first is drawn, the second zero, as in PEFT.
    """
    gpt = _gpt()

    @functools.cache
    def learned() -> dict[Any, Any]:
        return dict(nnx.to_flat_state(gpt.init(0)))

    def adapted(path: Any) -> bool:
        return path[0] == "blocks" and path[-1] == "kernel"

    def init(seed: int) -> optax.Params:
        key, adapters = jax.random.key(seed), {}
        for path, kernel in learned().items():
            if adapted(path):
                key, own = jax.random.split(key)
                inputs, outputs = kernel.shape
                bound = inputs**-0.5
                a = jax.random.uniform(own, (inputs, RANK), minval=-bound, maxval=bound)
                adapters[*path[:-1], "lora_a"] = a
                adapters[*path[:-1], "lora_b"] = jnp.zeros((RANK, outputs))
        return traverse_util.unflatten_dict({tuple(map(str, k)): v for k, v in adapters.items()})

    def merged(params: optax.Params) -> optax.Params:
        own: dict[Any, Any] = traverse_util.flatten_dict(params)
        weights = {}
        for path, weight in learned().items():
            if adapted(path):
                place = tuple(map(str, path[:-1]))
                product = own[*place, "lora_a"] @ own[*place, "lora_b"]
                weight = weight.replace(weight[...] + ALPHA / RANK * product)
            weights[path] = weight
        return nnx.from_flat_state(weights)

    return gpt._replace(
        name="finetuning-lora",
        init=init,
        loss=lambda params, batch: gpt.loss(merged(params), batch),
        held_out=lambda params: gpt.held_out(merged(params)),
        settings=gpt.settings | {"rank": RANK, "alpha": ALPHA, "pretraining_seed": 0},
    )
