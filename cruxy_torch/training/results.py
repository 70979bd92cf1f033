"""What a run comes to: a dictionary, a JSON file, a picture of both curves."""

import io
import json
import math
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from cruxy_control.memory import GB
from cruxy_torch._memory.estimate import nbytes, shared_parameters, state_bytes
from cruxy_torch.training.checkpoint import write

_STATUS = Path("/proc/self/status")

ADAM_BYTES = 12
"""Bytes a parameter of Adam's in float32: a gradient of 4 and two moments of 8."""


def percent_better(values: Sequence[float]) -> float | None:
    """By how much the last value is below the first, in percent of it."""
    if not values or values[0] == 0.0:
        return None
    return 100.0 * (values[0] - values[-1]) / values[0]


def perplexity(loss: float) -> float:
    """`exp(loss)`; infinite where that is too large to be written."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) else math.inf


def compression(trained: int, gradients: int, state: int) -> float | None:
    """Bytes of Adam's gradients and state over those that are held.

    Args:
        trained: parameters that are trained.
        gradients: bytes of the gradients that are alive at once.
        state: bytes of the optimizer's state.
    """
    held = gradients + state
    return ADAM_BYTES * trained / held if held else None


def held_bytes(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Parameters that are trained, and bytes: of all parameters, of gradients, of state.

    Of gradients those that are alive at once: the largest, and those that wait for several modules,
    where each is released.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    sizes = [nbytes(p) for p in trained]
    gradients = sum(sizes)
    if getattr(optimizer, "_release", None) is not None:
        waiting = sum(nbytes(p) for p in shared_parameters(model) if p.requires_grad)
        gradients = min(gradients, waiting + max(sizes, default=0))
    return {
        "trained": sum(p.numel() for p in trained),
        "parameters": sum(map(nbytes, model.parameters())),
        "gradients": gradients,
        "state": state_bytes(optimizer),
    }


def collect(
    history: dict[str, Any],
    step: int,
    held: dict[str, int],
    telemetry: dict[str, Any],
    counts_tokens: bool,
    device: torch.device,
) -> dict[str, Any]:
    """The dictionary that `Trainer.fit` documents."""
    trained, val = history["train_losses"], history["val_losses"]
    ppls = [perplexity(v) for v in val] if counts_tokens and val else None
    first, last = (ppls[0], ppls[-1]) if ppls else (None, None)
    cuda = device.type == "cuda"
    timed = history["tokens"] and history["seconds"]
    return {
        "train_losses": list(trained),
        "initial_train_loss": trained[0] if trained else None,
        "final_train_loss": trained[-1] if trained else None,
        "train_improvement_pct": percent_better(trained),
        "val_losses": list(val),
        "val_ppls": ppls,
        "initial_val_ppl": first,
        "final_val_ppl": last,
        "val_improvement_pct": percent_better(ppls or val),
        "peak_vram_gb": torch.cuda.max_memory_allocated(device) / GB if cuda else None,
        "tokens_per_sec": history["tokens"] / history["seconds"] if timed else None,
        "total_time_min": history["seconds"] / 60.0,
        "compression_total": compression(held["trained"], held["gradients"], held["state"]),
        "steps": step,
        "val_steps": list(history["val_steps"]),
        "peak_rss_gb": peak_rss_gb(),
        "skipped_total": telemetry.get("skipped_total", 0),
        "telemetry": telemetry,
        "memory": held,
        "environment": environment(),
    }


def environment() -> dict[str, Any]:
    """What the run ran on."""
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
    }


def peak_rss_gb() -> float | None:
    """Gigabytes of memory that the process has held at most; `None` where no system says so."""
    if _STATUS.exists():  # the other number begins, on Linux, with that of the parent process
        return resident_gb("VmHWM")
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GB


def resident_gb(kind: str) -> float:
    """Gigabytes that are resident, on Linux: `"VmRSS"` those of now, `"VmHWM"` the most ever."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return 1024 * int(lines[kind].split()[0]) / GB


def save(results: dict[str, Any], prefix: str | Path) -> None:
    """Writes `prefix.json` and `prefix.png`; without matplotlib the first alone, with a warning."""
    path = Path(prefix)
    text = json.dumps(_finite(results), indent=1, allow_nan=False)
    write(path.with_name(path.name + ".json"), lambda file: file.write(text.encode()))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        warnings.warn(
            "matplotlib is not installed, and no picture is drawn; pip install matplotlib.",
            stacklevel=3,
        )
        return
    drawn = _drawn(results, Figure(figsize=(7, 4), layout="constrained"))
    write(path.with_name(path.name + ".png"), lambda file: file.write(drawn))


def _drawn(results: dict[str, Any], figure: Any) -> bytes:
    axes = figure.subplots()
    losses = results["train_losses"]
    axes.plot(range(1, len(losses) + 1), losses, color="C0", linewidth=1.0, label="training")
    if results["val_losses"]:
        steps = results["val_steps"]
        axes.plot(steps, results["val_losses"], "o-", color="C1", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _finite(node: Any) -> Any:
    """With `None` for what JSON has no number for."""
    if isinstance(node, dict):
        return {name: _finite(value) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [_finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node
