"""`python -m cruxy_torch.backends`: what `backends()` says, and the machine, for bug reports."""

import argparse
import os
import platform
import statistics
import time
from typing import Any

import torch

from cruxy_torch._optimizers.cruxy import CruxyOptimizer
from cruxy_torch.backends import VARIABLE, Backend, backends, chosen

_ROUNDS, _STEPS, _TENSORS, _WIDTH = 5, 5, 16, 256
_OPTIONS: dict[str, dict[str, Any]] = {
    "native": {"fused": True},
    "foreach": {"foreach": True},
    "reference": {"fused": False, "foreach": False},
    "compile": {"compile": True},
}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m cruxy_torch.backends", description=__doc__)
    parser.add_argument("--build", action="store_true", help="build what is not built yet")
    parser.add_argument(
        "--time",
        action="store_true",
        help="time a step on CPU, in five rounds that take turns; a compiled one with --build only",
    )
    arguments = parser.parse_args()
    found = backends(build=arguments.build)
    print(_machine())
    print(_table(found))
    if arguments.time:
        there = [b.name for b in found if b.available and b.name != "triton"]  # not on CPU
        timed = [name for name in there if arguments.build or name != "compile"]
        print("\n" + _times(timed))


def _machine() -> str:
    cpu = torch.backends.cpu.get_cpu_capability()
    try:
        taken = f"{chosen()!r} is taken"
    except ValueError as error:
        taken = str(error)
    return (
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}\n"
        f"CPU capability {cpu}, {torch.get_num_threads()} threads, CUDA {torch.version.cuda}\n"
        f"{VARIABLE}={os.environ.get(VARIABLE, '')}: {taken}\n"
    )


def _table(found: list[Backend]) -> str:
    lines = [f"{'backend':<10} {'available':<10} why, file and flags"]
    for backend in found:
        rest = [backend.why, str(backend.path or ""), " ".join(backend.flags)]
        there = "yes" if backend.available else "no"
        lines.append(f"{backend.name:<10} {there:<10} {'; '.join(filter(None, rest))}".rstrip())
    return "\n".join(lines)


def _times(names: list[str]) -> str:
    """Milliseconds a step, of Adam on a million parameters; rounds take turns, so drift is fair."""
    timers = {name: _Timer(name) for name in names}
    rounds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(_ROUNDS):
        for name, timer in timers.items():
            rounds[name].append(timer.milliseconds())
    lines = [f"{'backend':<10} {'median ms':<10} smallest to largest of {_ROUNDS} rounds"]
    for name, values in rounds.items():
        middle = statistics.median(values)
        lines.append(f"{name:<10} {middle:<10.2f} {min(values):.2f} to {max(values):.2f}")
    return "\n".join(lines)


class _Timer:
    """An optimizer over a million parameters on CPU, warmed up."""

    def __init__(self, name: str) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (_WIDTH, _WIDTH)
        self._params = [
            torch.nn.Parameter(
                torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            )
            for _ in range(_TENSORS)
        ]
        for param in self._params:
            param.grad = torch.randn_like(param)
        self._optimizer = CruxyOptimizer(self._params, **_OPTIONS[name])
        self.milliseconds()

    def milliseconds(self) -> float:
        """Of a step."""
        start = time.perf_counter()
        for _ in range(_STEPS):
            self._optimizer.step(loss=1.0)
        return 1e3 * (time.perf_counter() - start) / _STEPS


if __name__ == "__main__":
    main()
