"""JAX's part of `golden_runs`."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cruxy_optax as cruxy
import usual
from cruxy_control import SelfDriving
from golden_runs import SAVED, STEPS, digest, machine, start, stream

HELD = SelfDriving(limit_yield=None)
"""The law of then, whose limit did not give way."""

RUNS: dict[str, tuple[Any, str]] = {}
"""By name: what makes the optimizer, and the dtype of the parameters."""

for _bits in (None, 16, 8, 4):
    _b = "" if _bits is None else f"-{_bits}"
    RUNS[f"meta3{_b}"] = (lambda bits=_bits: cruxy.meta3(3e-3, state_bits=bits), "float32")
    RUNS[f"meta_lion{_b}"] = (lambda bits=_bits: cruxy.meta_lion(1e-3, state_bits=bits), "float32")
    RUNS[f"self_driving{_b}"] = (
        lambda bits=_bits: cruxy.self_driving(
            weight_decay=1e-4, mask=True, law=HELD, state_bits=bits
        ),
        "float32",
    )  # fmt: skip
    RUNS[f"self_driving_lion{_b}"] = (
        lambda bits=_bits: cruxy.self_driving_lion(weight_decay=1e-3, mask=True, state_bits=bits),
        "float32",
    )  # fmt: skip
    RUNS[f"cosmic{_b}"] = (
        lambda bits=_bits: cruxy.cosmic(3e-3, "40KB", state_bits=bits or 32), "float32",
    )  # fmt: skip
for _bits in (32, 16, 8, 4):
    RUNS[f"axiom-{_bits}"] = (
        lambda bits=_bits: cruxy.axiom(3e-3, 0.9, momentum_bits=bits), "float32",
    )  # fmt: skip
RUNS |= {
    "stability_v1": (lambda: cruxy.stability_v1(3e-3), "float32"),
    "stability_v2": (lambda: cruxy.stability_v2(3e-3), "float32"),
    "centralized": (lambda: cruxy.meta3(3e-3, centralize=True, nesterov=False), "float32"),
    "bounded": (lambda: cruxy.meta3(3e-3, bounds=(1e-4, 2e-3), weight_decay=0.1), "float32"),
    "schedule": (lambda: cruxy.meta3(optax.linear_schedule(1e-2, 0.0, 200)), "float32"),
    "axiom": (lambda: cruxy.axiom(3e-3), "float32"),
    "axiom_streak": (
        lambda: cruxy.axiom(3e-3, 0.9, streak_boost=1.5, snr_floor=0.1, relative_step=True),
        "float32",
    ),
    "cosmic_small": (lambda: cruxy.cosmic(3e-3, "1KB"), "float32"),
    "meta3_bfloat16": (lambda: cruxy.meta3(3e-3), "bfloat16"),
    "rounded": (lambda: cruxy.round_updates(cruxy.meta3(3e-3)), "bfloat16"),
    "rounded_kahan": (lambda: cruxy.round_updates(cruxy.meta_lion(1e-3), "kahan"), "bfloat16"),
    "quantized_around": (lambda: cruxy.quantize_state(cruxy.meta3(3e-3), 8), "float32"),
    "around_optax": (
        lambda: cruxy.stabilize(
            optax.chain(
                cruxy.clip_by_predicted_norm(),
                optax.partition(
                    {"a": optax.scale_by_adam(), "l": cruxy.scale_by_controlled_lion()},
                    {"w": "a", "c": "l", "b": "a", "s": "l"},
                ),
                optax.scale_by_learning_rate(3e-3),
                cruxy.limit_relative_step(0.05),
                cruxy.average_iterates(4.0),
            )
        ),
        "float32",
    ),
}


def parameters(dtype: str) -> dict[str, jax.Array]:
    return {k: jnp.asarray(v, dtype) for k, v in start().items()}


def stacked(dtype: str) -> tuple[Any, jax.Array]:
    """All gradients and losses of the stream."""
    grads, losses = stream()
    each = {k: jnp.asarray(np.stack([g[k] for g in grads]), dtype) for k in grads[0]}
    return each, jnp.asarray(losses, jnp.float32)


def train(tx: Any, params: Any, state: Any, steps: range, dtype: str) -> tuple[Any, Any]:
    """Takes these steps of the shared stream."""
    grads, losses = stacked(dtype)

    @usual.jit
    def step(params: Any, state: Any, grads: Any, loss: Any) -> Any:
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    for t in steps:
        params, state = step(params, state, {k: g[t] for k, g in grads.items()}, losses[t])
    return params, state


def paths(state: Any) -> list[str]:
    """Where the leaves of a state are."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return [jax.tree_util.keystr(path) for path, _ in flat]


def bits(params: Any, state: Any) -> list[np.ndarray]:
    """All leaves of parameters and state."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves((params, state))]


def basis() -> dict[str, str]:
    """What bits depend on beside the code."""
    return {"machine": machine(), "jax": jax.__version__, "optax": optax.__version__}


def _plain(array: np.ndarray) -> np.ndarray:
    """A dtype that `.npz` holds: bfloat16 as its bits."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def write(folder: Path) -> None:
    kept: dict[str, Any] = {f"basis/{k}": np.array(v) for k, v in basis().items()}
    for name, (make, dtype) in RUNS.items():
        tx, params = make(), parameters(dtype)
        params, state = train(tx, params, tx.init(params), range(SAVED), dtype)
        kept[f"{name}/paths"] = np.array(paths((params, state)))
        for i, leaf in enumerate(bits(params, state)):
            kept[f"{name}/leaf/{i}"] = _plain(leaf)
        params, state = train(tx, params, state, range(SAVED, STEPS), dtype)
        kept[f"{name}/digest"] = np.array(digest(bits(params, state)))
        kept[f"{name}/after"] = np.asarray(params["w"][:4], np.float32)
    np.savez_compressed(folder / "jax.npz", **kept)
    print(f"{len(RUNS)} runs, {(folder / 'jax.npz').stat().st_size:,} bytes")
