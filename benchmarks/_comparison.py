"""What the benchmarks that train share: their options, their runs and each one's best rate."""

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from benchmarks._runs import Record, Task
from benchmarks._statistics import Sensitivity, capped, sensitivity
from benchmarks._sweep import entry, sweep
from benchmarks.workloads import NAMES, Workload, load

Runs = Mapping[Task, Record]


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    optimizers: Sequence[str],
    workload: str = "shakespeare-small",
    seeds: int = 3,
) -> None:
    """Adds the options of a benchmark that trains.

    Args:
        parser: where to.
        optimizers: compared by default; "torch:NAME" is one of PyTorch's registry.
        workload: the default one.
        seeds: how many by default.
    """
    parser.add_argument("--workload", choices=NAMES, default=workload, help="default: %(default)s")
    parser.add_argument(
        "--optimizer",
        nargs="+",
        default=list(optimizers),
        metavar="NAME",
        help=f"default: {' '.join(optimizers)}; torch:NAME trains the model's PyTorch twin",
    )
    parser.add_argument(
        "--seeds",
        type=lambda text: _whole(text, "--seeds"),
        default=seeds,
        help="seeds 0, 1, ... (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=lambda text: _whole(text, "--steps"),
        help="a multiple of 4; default: the workload's",
    )
    parser.add_argument("--data", type=Path, help="a text file instead of the plays")
    parser.add_argument(
        "--workers",
        type=lambda text: _whole(text, "--workers", least=0),
        default=os.cpu_count() if jax.default_backend() == "cpu" else 0,
        help="processes of one thread; 0: all rates and seeds at once, for a GPU "
        "(default here: %(default)s)",
    )


def _whole(text: str, option: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(
            f"{option} must be a whole number of at least {least}, got {text}"
        )
    return int(text)


class Comparison:
    """Runs the tasks of one command and finds every optimizer's best rate.

    Args:
        options: as `add_arguments` made them.
        console: where progress is shown.

    Raises:
        ValueError: if an optimizer is not known, the steps are no multiple of 4, or PyTorch is to
            train what has no twin.
    """

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console
        data = options.data
        self.data = None if data is None else str(data)
        self.workload: Workload = load(options.workload, self.data)
        self.steps: int = options.steps or self.workload.steps
        if self.steps % 4:
            raise ValueError(f"--steps must be a multiple of 4, got {self.steps}.")
        self.seeds = tuple(range(options.seeds))
        for name in options.optimizer:
            label(name)
            if split(name)[0] == "torch":
                from benchmarks._torch.workloads.weights import load_twin

                load_twin(options.workload, self.data)

    def task(self, optimizer: str, rate: float, seed: int, **changes: Any) -> Task:
        """A run of the whole budget, evaluated at a quarter, half and the end of it."""
        framework, name = split(optimizer)
        quarter = self.steps // 4
        return Task(
            workload=self.workload.name,
            optimizer=name,
            rate=rate,
            seed=seed,
            steps=self.steps,
            evaluate_at=(quarter, 2 * quarter, self.steps),
            framework=framework,
            data=self.data,
        )._replace(**changes)

    def run(self, tasks: Iterable[Task]) -> dict[Task, Record]:
        """Runs what is not in the store yet."""
        store = self.options.output / "runs.jsonl"
        return sweep(tasks, store, workers=self.options.workers, console=self.console)

    def over_grid(
        self, optimizers: Iterable[str], seeds: Sequence[int] | None = None
    ) -> dict[str, dict[float, dict[int, Record]]]:
        """Every optimizer at every rate of its grid, by name, rate and seed."""
        seeds = self.seeds if seeds is None else seeds
        wanted = {
            (name, rate, seed): self.task(name, rate, seed)
            for name in optimizers
            for rate in rates(name)
            for seed in seeds
        }
        runs = self.run(wanted.values())
        return {
            name: {
                rate: {seed: runs[wanted[name, rate, seed]] for seed in seeds}
                for rate in rates(name)
            }
            for name in optimizers
        }

    def at_rates(
        self, rates: Mapping[str, float], seeds: Sequence[int]
    ) -> dict[str, dict[int, Record]]:
        """Every optimizer at the one rate given for it, by name and seed."""
        tasks = {
            name: {seed: self.task(name, rate, seed) for seed in seeds}
            for name, rate in rates.items()
        }
        runs = self.run(task for by_seed in tasks.values() for task in by_seed.values())
        return {
            name: {seed: runs[task] for seed, task in by_seed.items()}
            for name, by_seed in tasks.items()
        }

    def described(self) -> dict[str, Any]:
        """What was trained, for the figures; another number of steps is another part."""
        name, usual = self.workload.name, self.steps == self.workload.steps
        return {
            "part": name if usual else f"{name}-{self.steps}-steps",
            "workload": {
                "name": self.workload.name,
                "unit": self.workload.unit,
                "steps": self.steps,
                **self.workload.settings,
            },
            "seeds": list(self.seeds),
        }


def split(optimizer: str) -> tuple[str, str]:
    """Framework and name: "torch:meta3" is PyTorch's, "meta3" JAX's."""
    framework, _, name = optimizer.rpartition(":")
    return framework or "jax", name


def label(optimizer: str) -> str:
    """The name for people.

    Raises:
        ValueError: if there is no such optimizer.
    """
    framework, name = split(optimizer)
    try:
        found = entry(framework, name).label
    except KeyError as error:
        raise ValueError(
            f"--optimizer must be one of {', '.join(known(framework))}, got {name!r}."
        ) from error
    return f"{found} (PyTorch)" if framework == "torch" else found


def known(framework: str) -> list[str]:
    """Every name of a framework's registry."""
    if framework == "jax":
        from benchmarks._jax.our_optimizers import OPTIMIZERS

        return list(OPTIMIZERS)
    from benchmarks._torch.our_optimizers import OPTIMIZERS as TORCH_OPTIMIZERS

    return [f"torch:{name}" for name in TORCH_OPTIMIZERS]


def rates(optimizer: str) -> tuple[float, ...]:
    """The grid of an optimizer."""
    return entry(*split(optimizer)).rates()


def final(records: Mapping[int, Record]) -> dict[int, float]:
    """The held-out figure at the end by seed, a diverged run counted as not trained at all."""
    return {seed: capped(record.held_out[-1], record.start) for seed, record in records.items()}


def curve(by_rate: Mapping[float, Mapping[int, Record]]) -> Sensitivity:
    """Best rate and sensitivity, from the mean over seeds at every rate."""
    losses = {
        rate: float(np.mean(list(final(records).values()))) for rate, records in by_rate.items()
    }
    starts = [record.start for records in by_rate.values() for record in records.values()]
    return sensitivity(losses, float(np.mean(starts)))
