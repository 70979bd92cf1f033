"""Time of one PyTorch optimizer step, every optimizer in one interleaved run.

    python -m benchmarks.step_time_torch --size 10m

Gradients are the same every step and stay where they are. On a GPU each step is waited for.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table

from benchmarks._command import parser, publish
from benchmarks._environment import environment
from benchmarks._shapes import SIZES
from benchmarks._timing import cells, interleave, summary
from cruxy_torch import CruxyOptimizer

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "meta3": lambda p: CruxyOptimizer(p, lr=1e-3),
    "meta_lion": lambda p: CruxyOptimizer(p, lr=1e-4, use_lion=True),
    "meta_lion bfloat16": lambda p: CruxyOptimizer(
        p, lr=1e-4, use_lion=True, momentum_dtype=torch.bfloat16
    ),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "cruxy 2.1.0 meta3": lambda p: _original(p, use_lion=False),
    "cruxy 2.1.0 meta_lion": lambda p: _original(p, use_lion=True),
}
REFERENCE = "AdamW fused"


def _original(params: list[torch.nn.Parameter], *, use_lion: bool) -> torch.optim.Optimizer:
    import cruxy  # a test dependency, not needed to time the others

    return cruxy.CruxyOptimizer(params, lr=1e-3, use_lion=use_lion)


class Step:
    """One optimizer on parameters of its own."""

    def __init__(self, name: str, size: str, device: torch.device) -> None:
        """Draws parameters and gradients, and takes the first step, which may compile."""
        draw = torch.Generator(device).manual_seed(0)

        def normal(shape: tuple[int, ...], scale: float) -> torch.Tensor:
            return scale * torch.randn(shape, device=device, generator=draw)

        self.params = [torch.nn.Parameter(normal(s, 0.02)) for s in SIZES[size].values()]
        for param in self.params:
            param.grad = normal(tuple(param.shape), 0.001)
        self.optimizer = OPTIMIZERS[name](self.params)
        takes_loss = name.startswith(("meta", "cruxy"))
        loss = torch.tensor(1.0, device=device)
        self.step = functools.partial(self.optimizer.step, **({"loss": loss} if takes_loss else {}))
        self.device = device
        self.time()

    @property
    def state_bytes(self) -> int:
        """Bytes of all tensors in the optimizer's state, the controller's included."""
        held = [v for state in self.optimizer.state.values() for v in state.values()]
        held += self.optimizer.param_groups[0].get("controller", {}).values()
        return sum(v.nbytes for v in held if isinstance(v, torch.Tensor))

    def time(self) -> float:
        """Seconds of one step, waited for."""
        start = time.perf_counter()
        self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def measure(size: str, repeats: int, names: list[str], device: torch.device) -> dict[str, Any]:
    """All figures of one parameter set.

    Args:
        size: a key of `SIZES`.
        repeats: interleaved rounds that count.
        names: keys of `OPTIMIZERS`; the reference is always among them.
        device: where the parameters are.
    """
    names = [REFERENCE, *(name for name in names if name != REFERENCE)]
    steps = {name: Step(name, size, device) for name in names}
    count = sum(p.numel() for p in steps[REFERENCE].params)
    rows = summary(interleave({n: s.time for n, s in steps.items()}, repeats), REFERENCE)
    for name, step in steps.items():
        rows[name]["state_bytes_per_parameter"] = step.state_bytes / count
    return {"size": size, "parameters": count, "repeats": repeats, "optimizers": rows}


def table(result: dict[str, Any]) -> Table:
    """The figures as a table."""
    millions, rounds = result["parameters"] / 1e6, result["repeats"]
    shown = Table(title=f"PyTorch optimizer step, {millions:.1f}M parameters, {rounds} rounds")
    shown.add_column("optimizer")
    for column in ("ms", "ratio", "quartiles", "state B/param"):
        shown.add_column(column, justify="right")
    for name, row in result["optimizers"].items():
        shown.add_row(name, *cells(row), f"{row['state_bytes_per_parameter']:.3f}")
    return shown


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints a table and writes JSON."""
    command = parser("step_time_torch", __doc__, OPTIMIZERS)
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = command.parse_args(arguments)
    device = torch.device(options.device)
    result = measure(options.size, options.repeats, options.optimizer or list(OPTIMIZERS), device)
    result["environment"] = environment() | {"torch": torch.__version__, "device": str(device)}
    publish(result, table(result), options.output, f"{device}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
