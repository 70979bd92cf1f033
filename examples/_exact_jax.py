"""The JAX side of `exact_training.py`."""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cruxy_exact import initial
from cruxy_exact.random_bits import random_bits
from cruxy_exact.reference import Reference
from cruxy_optax import exact

REFERENCE = Reference(grain=1)
SIDE, PATCH, CLASSES, WIDTH = 16, 4, 8, 64
PLACES = (SIDE // PATCH) ** 2
HOST = np.zeros(1, np.float32)
"""Data and initial values are drawn on the host, where they are the same as anywhere."""


def vit_init() -> dict[str, np.ndarray]:
    """The parameters of a small ViT: patches, two blocks, a linear head on all tokens."""

    def linear(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.w": shape, f"{name}.b": shape[-1:]}

    shapes = {**linear("patch", PATCH, PATCH, 1, WIDTH), "pos": (PLACES, WIDTH)}
    for i in range(2):
        shapes |= {**linear(f"{i}.ln1", WIDTH), **linear(f"{i}.ln2", WIDTH)}
        shapes |= linear(f"{i}.attention.qkv", WIDTH, 3 * WIDTH)
        shapes |= linear(f"{i}.attention.out", WIDTH, WIDTH)
        shapes |= linear(f"{i}.up", WIDTH, 2 * WIDTH)
        shapes |= linear(f"{i}.dn", 2 * WIDTH, WIDTH)
    shapes |= {**linear("ln", WIDTH), **linear("head", PLACES * WIDTH, CLASSES)}
    params = {}
    for leaf, (name, shape) in enumerate(sorted(shapes.items())):
        params[name] = np.full(shape, name.endswith(".w"), np.float32)
        if len(shape) > 1:
            scale = 0.03 if name == "pos" else 1 / np.prod(shape[:-1]) ** 0.5
            key = REFERENCE.key(0, 100 + leaf, HOST, xp=np)
            params[name] = initial.uniform(shape, float(scale), key, xp=np)
    return params


def vit_loss(p: Any, x: Any, y: Any) -> jax.Array:
    """The sum of the cross entropy over images `[n, 16, 16, 1]` and labels `[n]`."""

    def at(name: str, h: Any, layer: Any = exact.linear) -> Any:
        return layer(h, p[f"{name}.w"], p[f"{name}.b"])

    h = at("patch", x, exact.patch_embedding)
    places = jnp.broadcast_to(jnp.arange(PLACES, dtype=jnp.int32), h.shape[:2])
    h = exact.add(h, exact.embed(p["pos"], places))
    for i in range(2):
        qkv = at(f"{i}.attention.qkv", at(f"{i}.ln1", h, exact.layer_norm))
        a = exact.fused_attention(qkv, 4, causal=False)
        h = exact.add(h, at(f"{i}.attention.out", a))
        a = exact.gelu(at(f"{i}.up", at(f"{i}.ln2", h, exact.layer_norm)), approximate=False)
        h = exact.add(h, at(f"{i}.dn", a))
    logits = at("head", at("ln", h, exact.layer_norm).reshape(len(x), -1))
    return exact.sum(exact.softmax_cross_entropy_with_integer_labels(logits, y))


def images(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright square whose place is the class; `[8, 16, 16, 1]` and `[8]`."""
    key = REFERENCE.key(step, 700, HOST, xp=np)
    labels = (random_bits(key, np.arange(REFERENCE.batch, dtype=np.int32)) >> 9) & (CLASSES - 1)
    shape = (REFERENCE.batch, SIDE, SIDE, 1)
    noise = initial.uniform(shape, 1.0, REFERENCE.key(step, 701, HOST, xp=np), xp=np)
    row = np.arange(SIDE)
    bright = (row[None, :, None] // 2 == labels[:, None, None]) & (row[None, None, :] > 7)
    return noise + bright[..., None].astype(np.float32), labels


def train(options: argparse.Namespace) -> str:
    """Trains, prints the loss now and then and the checksum, and returns that."""
    is_gpt = options.model == "gpt"
    count = REFERENCE.batch * (REFERENCE.length if is_gpt else 1)
    adamw = exact.adamw(REFERENCE.lr)
    tx: Any = exact.accumulate_grains(
        optax.chain(exact.clip_by_global_norm(REFERENCE.clip), adamw),
        every=options.micro_batches,
        count=count,
    )

    def loss(params: Any, x: Any, y: Any, step: Any, number: Any) -> jax.Array:
        if is_gpt:
            return exact.reference_loss(REFERENCE, params, x, y, step, number)
        return vit_loss(params, x, y)

    @jax.jit
    def call(params: Any, state: Any, x: Any, y: Any, numbers: Any, step: Any) -> Any:
        def grain(grains: Any, one: Any) -> Any:  # a sample is a grain
            x, y, number = one
            value, grads = jax.value_and_grad(loss)(params, x[None], y[None], step, number)
            return exact.add_grain(grains, grads), value

        grains, losses = jax.lax.scan(grain, exact.no_grains(params), (x, y, numbers))
        updates, state = tx.update(grains, state, params)
        return exact.apply_updates(params, updates), state, losses

    with np.errstate(over="ignore"):
        params = REFERENCE.init(HOST, xp=np) if is_gpt else vit_init()
        params = {name: jnp.asarray(p) for name, p in params.items()}
        begin, params, state = load(options.load, params, tx) if options.load else (
            0, params, tx.init(params),
        )  # fmt: skip
        for step in range(begin, options.steps):
            x, y = REFERENCE.data(step, HOST, xp=np) if is_gpt else images(step)
            losses: list[Any] = []
            for part in np.split(np.arange(len(x), dtype=np.int32), options.micro_batches):
                params, state, some = call(params, state, x[part], y[part], part, jnp.int32(step))
                losses.append(some)
            if step % 10 == 0 or step == options.steps - 1:
                print(f"step {step}: loss {float(np.concatenate(losses).sum()) / count:.3f}")
    checksum = exact.checksum(params, grain=REFERENCE.grain)
    print(f"checksum {checksum}")
    if options.save:
        save(options.save, params, state.inner_state[1], options.steps)
    return checksum


def save(path: Any, params: Any, adam: exact.AdamWState, steps: int) -> None:
    """Parameters, moments, products of decay rates and the number of steps."""
    kinds = {"p": params, "m": adam.mu, "v": adam.nu}
    arrays = {f"{kind}/{name}": x for kind, tree in kinds.items() for name, x in tree.items()}
    products = np.asarray([adam.mu_decay, adam.nu_decay], np.float32)
    np.savez(path, steps=np.int32(steps), products=products, **arrays)


def load(path: Any, like: Any, tx: Any) -> tuple[int, Any, Any]:
    """The steps, the parameters and the optimizer's state of a saved run."""
    arrays = np.load(path)
    params, mu, nu = ({k: jnp.asarray(arrays[f"{kind}/{k}"]) for k in like} for kind in "pmv")
    clip, adam = (state := tx.init(params)).inner_state
    count, products = jnp.int32(arrays["steps"]), map(jnp.float32, arrays["products"])
    adam = exact.AdamWState(count, mu, nu, *products)
    return int(arrays["steps"]), params, state._replace(inner_state=(clip, adam))
