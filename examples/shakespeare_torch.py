"""Trains a character-level GPT on Shakespeare in PyTorch with AdamW, self-driving and Meta3.

    python examples/shakespeare_torch.py
    python examples/shakespeare_torch.py --model paper --optimizer adamw meta3 --learning-rate 5e-3

Model, batches, table and plot are those of examples/shakespeare.py. Every optimizer starts from the
same weights and sees the same batches. At the end: a table, a sample of generated text, and in the
output directory a plot, the figures as JSON and the controlled optimizers' telemetry as JSON lines.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from _data import Corpus, validation_windows
from _demo import OPTIMIZERS, VALIDATION_WINDOWS, WEIGHT_DECAY, GPTConfig, Trained, chunks
from _demo import main as demo
from _gpt_torch import GPT
from cruxy_torch import CruxyOptimizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

OPTIONS: dict[str, dict[str, Any]] = {
    "meta3": {},
    "meta_lion": {"use_lion": True, "betas": (0.9, 0.99)},
    "self_driving": {"mode": "self_driving"},
    "stability_v1": {"mode": "stability_v1"},
    "stability_v2": {"mode": "stability_v2"},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the demo with the command line `argv`, by default the process's own."""
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    demo(train, __doc__ or "", device, ["torch"], argv)


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
    torch.manual_seed(seed)
    model = GPT(config, len(corpus.characters)).to(DEVICE)
    tx = make_optimizer(optimizer, model, rate, log)
    held_out = validation_windows(corpus.validation, config.context, VALIDATION_WINDOWS)
    readings: list[dict[str, float]] = []
    validation: list[tuple[int, float]] = []
    seconds: list[float] = []
    for taken, windows, validate in chunks(corpus, config, steps=steps, batch=batch, seed=seed):
        start = time.perf_counter()
        for window in on_device(windows):
            tx.zero_grad()
            value = loss(model, window)
            value.backward()
            # Both kinds of reading wait for the device once, so that both are timed alike.
            if isinstance(tx, CruxyOptimizer):
                tx.step(loss=value)
                readings.append(tx.telemetry())
            else:
                tx.step()
                readings.append({"loss": value.item(), "learning_rate": tx.param_groups[0]["lr"]})
        seconds.append((time.perf_counter() - start) / len(windows))
        watch(taken, readings[-1])
        if validate:
            with averaged(tx, optimizer):
                validation.append((taken, validation_loss(model, held_out, batch)))

    def continued(prompt: np.ndarray, length: int) -> np.ndarray:
        with averaged(tx, optimizer):
            return sample(model, prompt, length, seed)

    parameters = sum(p.numel() for p in model.parameters())
    # The first chunk builds or compiles what the steps need.
    steady = seconds[1:] if len(seconds) > 1 else seconds
    return Trained(
        parameters=parameters,
        telemetry={key: np.array([line[key] for line in readings]) for key in readings[0]},
        validation=validation,
        seconds_per_step=statistics.median(steady),
        state_bytes_per_parameter=state_bytes(tx) / parameters,
        sample=continued,
    )


def averaged(tx: torch.optim.Optimizer, name: str) -> contextlib.AbstractContextManager[None]:
    """Inside the block the model has the parameters that are to be evaluated."""
    if isinstance(tx, CruxyOptimizer) and OPTIMIZERS[name].self_driving:
        return tx.averaged()
    return contextlib.nullcontext()


def make_optimizer(name: str, model: GPT, rate: float | None, log: Path) -> torch.optim.Optimizer:
    """The optimizer of that name; weight decay is for matrices, not for the gains of the norms."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    given: dict[str, Any] = {} if rate is None else {"lr": rate}
    if not OPTIMIZERS[name].controlled:
        return torch.optim.AdamW(groups, **given)
    return CruxyOptimizer(groups, **given, log_metrics=True, metrics_path=log, **OPTIONS[name])


def on_device(windows: np.ndarray) -> Tensor:
    """Token ids as PyTorch looks them up."""
    return torch.from_numpy(windows).long().to(DEVICE)


def loss(model: GPT, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats per character of `windows`, shape `(batch, context + 1)`."""
    logits = model(windows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: GPT, windows: np.ndarray, batch: int) -> float:
    """`loss` over all `windows`, `batch` of them at a time."""
    parts = on_device(windows).split(batch)
    return sum(loss(model, part).item() * len(part) for part in parts) / len(windows)


@torch.no_grad()
def sample(model: GPT, prompt: np.ndarray, length: int, seed: int) -> np.ndarray:
    """Continues a text, one token after the other, at temperature 0.8.

    Args:
        model: the trained model.
        prompt: int32, shape `(context,)`.
        length: how many tokens to add.
        seed: of the draws.

    Returns:
        The new tokens, shape `(length,)`.
    """
    generator = torch.Generator(DEVICE).manual_seed(seed)
    window = on_device(prompt)
    tokens = []
    for _ in range(length):
        chances = (model(window[None])[0, -1] / 0.8).softmax(-1)
        token = torch.multinomial(chances, 1, generator=generator)
        window = torch.cat([window[1:], token])
        tokens.append(token)
    return torch.cat(tokens).cpu().numpy()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors an optimizer keeps, the controller's among them."""
    kept = [*optimizer.state.values(), optimizer.param_groups[0].get("controller", {})]
    tensors = (value for part in kept for value in part.values() if isinstance(value, Tensor))
    return sum(tensor.nbytes for tensor in tensors)


if __name__ == "__main__":
    main()
