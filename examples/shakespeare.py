"""Trains a character-level GPT on Shakespeare with AdamW, self-driving and Meta3, side by side.

    python examples/shakespeare.py
    python examples/shakespeare.py --optimizer adamw self_driving --learning-rate 0.1
    python examples/shakespeare.py --model paper --optimizer adamw meta3 --learning-rate 5e-3

Every optimizer starts from the same weights and sees the same batches. AdamW and Meta3 get the
rate that is best of seven for the small model (python -m benchmarks rate-sensitivity), self-driving
gets none. At the end: a table, a sample of generated text, and in the output directory a plot, the
figures as JSON and each optimizer's telemetry as JSON lines. Ctrl-C ends it early and shows what
there is.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import _training
import cruxy_optax
from _data import Corpus
from _demo import OPTIMIZERS, WEIGHT_DECAY, GPTConfig, Trained
from _demo import main as demo

MAKERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    "meta3": cruxy_optax.meta3,
    "meta_lion": cruxy_optax.meta_lion,
    "self_driving": cruxy_optax.self_driving,
    "stability_v1": cruxy_optax.stability_v1,
    "stability_v2": cruxy_optax.stability_v2,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the demo with the command line `argv`, by default the process's own."""
    device = jax.devices()[0].device_kind
    demo(train, __doc__ or "", device, ["jax", "flax", "optax"], argv)


def train(
    optimizer: str,
    rate: float | None,
    corpus: Corpus,
    config: GPTConfig,
    *,
    steps: int,
    batch: int,
    seed: int,
    log: Path,
    watch: Callable[[int, Mapping[str, Any]], None],
) -> Trained:
    """Trains a new model; the arguments are those of `_demo.Train`."""
    given = () if rate is None else (rate,)
    tx = MAKERS[optimizer](*given, weight_decay=WEIGHT_DECAY, mask=_matrices)

    def read(opt_state: optax.OptState) -> Mapping[str, jax.Array]:
        if OPTIMIZERS[optimizer].controlled:
            return cruxy_optax.telemetry(opt_state)
        return {"learning_rate": jnp.asarray(rate, jnp.float32)}

    with cruxy_optax.TelemetryLog(log) as telemetry_log:

        def watch_chunk(taken: int, chunk: Mapping[str, np.ndarray]) -> None:
            count = len(chunk["loss"])
            lines = [{key: values[i] for key, values in chunk.items()} for i in range(count)]
            for step, line in enumerate(lines, start=taken - count + 1):
                telemetry_log.log(step, line)
            watch(taken, lines[-1])

        return _training.train(
            tx,
            corpus,
            config,
            steps=steps,
            batch=batch,
            seed=seed,
            read=read,
            watch=watch_chunk,
            averaged=cruxy_optax.averaged_params if OPTIMIZERS[optimizer].self_driving else None,
        )


def _matrices(params: optax.Params) -> Any:
    """Weight decay is for matrices; the gains of the norms are left alone."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


if __name__ == "__main__":
    main()
