"""Five small models whose memory is estimated and measured.

As a program, trains one of them for a few steps and prints the estimated and the measured peak:
`python tests/memory_models.py mlp`.
"""

import ctypes
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Model(NamedTuple):
    params: Any
    loss: Callable[..., jax.Array]
    batch: jax.Array


def _weights(seed: int, shapes: dict[str, tuple[int, ...]], dtype: Any = jnp.float32) -> Any:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: 0.05 * jax.random.normal(key, shape, dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def mlp() -> Model:
    """Four layers of 1024, ReLU."""
    params = _weights(0, {f"w{i}": (1024, 1024) for i in range(4)})

    def loss(params: Any, x: jax.Array) -> jax.Array:
        for name in sorted(params):
            x = jax.nn.relu(x @ params[name])
        return jnp.mean(x**2)

    return Model(params, loss, jnp.ones((2048, 1024)))


def conv() -> Model:
    """Three convolutions, then a mean over the image."""
    shapes = {"a": (3, 3, 3, 32), "b": (3, 3, 32, 64), "c": (3, 3, 64, 64), "out": (64, 10)}
    params = _weights(1, shapes)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        for name in ("a", "b", "c"):
            dimensions = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                x, params[name], (1, 1), "SAME", dimension_numbers=dimensions
            )
            x = jax.nn.relu(x)
        logits = x.mean((1, 2)) @ params["out"]
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.arange(len(x)) % 10
        ).mean()

    return Model(params, loss, jnp.ones((96, 32, 32, 3)))


def _norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * gain


def _attend(x: jax.Array, qkv: jax.Array, out: jax.Array, heads: int, causal: bool) -> jax.Array:
    q, k, v = jnp.split(x @ qkv, 3, axis=-1)
    split = (*x.shape[:2], heads, x.shape[-1] // heads)
    mixed = jax.nn.dot_product_attention(
        q.reshape(split), k.reshape(split), v.reshape(split), is_causal=causal
    )
    return mixed.reshape(x.shape) @ out


def _blocks(layers: int, width: int, hidden: int, gated: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        shapes |= {
            f"{i}.n1": (width,),
            f"{i}.qkv": (width, 3 * width),
            f"{i}.out": (width, width),
            f"{i}.n2": (width,),
            f"{i}.up": (width, hidden),
            f"{i}.down": (hidden, width),
        }
        if gated:
            shapes[f"{i}.gate"] = (width, hidden)
    return shapes


def _run_blocks(params: Any, x: jax.Array, layers: int, heads: int, causal: bool) -> jax.Array:
    for i in range(layers):
        p = {name: params[f"{i}.{name}"] for name in ("n1", "qkv", "out", "n2", "up", "down")}
        x = x + _attend(_norm(x, p["n1"]), p["qkv"], p["out"], heads, causal)
        h = _norm(x, p["n2"])
        up = h @ p["up"]
        up = jax.nn.silu(h @ params[f"{i}.gate"]) * up if f"{i}.gate" in params else jax.nn.gelu(up)
        x = x + up @ p["down"]
    return x


def gpt() -> Model:
    """Two causal blocks of 256 with a tied vocabulary of 512."""
    params = _weights(2, {"tokens": (512, 256), **_blocks(2, 256, 1024, gated=False)})

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        x = _run_blocks(params, params["tokens"][tokens[:, :-1]], 2, 4, causal=True)
        logits = x @ params["tokens"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    tokens = np.random.default_rng(0).integers(0, 512, (16, 129))
    return Model(params, loss, jnp.asarray(tokens, jnp.int32))


def vit() -> Model:
    """Patches of 4 by 4 through two blocks of 192 that see each other."""
    params = _weights(
        3, {"patch": (48, 192), "head": (192, 10), **_blocks(2, 192, 768, gated=False)}
    )

    def loss(params: Any, images: jax.Array) -> jax.Array:
        count = len(images)
        patches = images.reshape(count, 8, 4, 8, 4, 3).swapaxes(2, 3).reshape(count, 64, 48)
        x = _run_blocks(params, patches @ params["patch"], 2, 3, causal=False)
        logits = x.mean(1) @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.arange(count) % 10
        ).mean()

    return Model(params, loss, jnp.ones((64, 32, 32, 3)))


def llama() -> Model:
    """Two gated blocks of 256 in bfloat16, with a head of its own."""
    shapes = {"tokens": (2048, 256), "head": (256, 2048), **_blocks(2, 256, 688, gated=True)}
    params = _weights(4, shapes, jnp.bfloat16)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        x = _run_blocks(params, params["tokens"][tokens[:, :-1]], 2, 4, causal=True)
        logits = (x @ params["head"]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    tokens = np.random.default_rng(0).integers(0, 2048, (8, 129))
    return Model(params, loss, jnp.asarray(tokens, jnp.int32))


MODELS = {"mlp": mlp, "conv": conv, "gpt": gpt, "vit": vit, "llama": llama}


def train_step(tx: optax.GradientTransformationExtraArgs, loss: Callable[..., jax.Array]) -> Any:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, batch: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, value=value)
        return optax.apply_updates(params, updates), opt_state, value

    return step


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def main(name: str) -> None:
    """Estimates, then runs, and lets the kernel say how much memory the process came to hold."""
    import cruxy_optax

    params, loss, batch = MODELS[name]()
    tx = cruxy_optax.meta3(1e-3)
    step = train_step(tx, loss)
    estimate = cruxy_optax.estimate_memory(tx, params, train_step=step, args=(batch,))
    compiled = step.lower(params, tx.init(params), batch).compile()
    carry = params, tx.init(params)
    del params
    peaks = []
    for _ in range(6):
        jax.block_until_ready(carry)
        time.sleep(0.1)  # buffers are freed a little after results are ready
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the kernel
        Path("/proc/self/clear_refs").write_text("5")  # forgets the highest value so far
        before = _resident("VmRSS")
        *carry, _ = compiled(*carry, batch)
        jax.block_until_ready(carry)
        peaks.append(_resident("VmHWM") - before + estimate.arguments)
    # The first step also brings code and threads into memory.
    print(json.dumps({"estimated": estimate.peak, "measured": statistics.median(peaks[1:])}))


if __name__ == "__main__":
    main(sys.argv[1])
