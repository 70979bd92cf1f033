"""What the benchmarks that train share: their options, their runs and each one's best rate."""

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks._environment import device
from benchmarks._frameworks import FRAMEWORKS, installed, room
from benchmarks._rates import scaled
from benchmarks._runs import Record, Task
from benchmarks._statistics import Sensitivity, capped, sensitivity
from benchmarks._sweep import entry, sweep
from benchmarks.workloads import NAMES, Workload, load

Runs = Mapping[Task, Record]


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    optimizers: Sequence[str] | None,
    workload: str = "shakespeare-small",
    seeds: int = 3,
    first_seed: int = 0,
) -> None:
    """Adds the options of a benchmark that trains.

    Args:
        parser: where to.
        optimizers: compared by default, those of them that the framework has; `None` where that
            depends on other options.
        workload: the default one.
        seeds: how many by default.
        first_seed: the first of them by default.
    """
    shown = "depends on the other options" if optimizers is None else " ".join(optimizers)
    parser.add_argument("--workload", choices=NAMES, default=workload, help="default: %(default)s")
    parser.add_argument(
        "--optimizer",
        nargs="+",
        metavar="NAME",
        help=f"default: {shown}; torch:NAME trains in PyTorch whatever --framework says",
    )
    parser.set_defaults(usual=optimizers)
    parser.add_argument(
        "--framework",
        choices=FRAMEWORKS,
        default=next(iter(installed()), "jax"),
        help="of every optimizer whose name does not say it (default here: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=lambda text: _whole(text, "--seeds"),
        default=seeds,
        help="how many seeds (default: %(default)s)",
    )
    parser.add_argument(
        "--first-seed",
        type=lambda text: _whole(text, "--first-seed", least=0),
        default=first_seed,
        help="the first of them, for seeds that nothing was chosen on (default: %(default)s)",
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
        help="processes of one thread; 0: all in this one, in JAX all rates and seeds at once, for "
        f"a GPU (default: 0 where there is one, and else {os.cpu_count()}, one a core)",
    )


def add_rates(parser: argparse.ArgumentParser, default: tuple[float, ...] | None = None) -> None:
    """Adds the option that takes the place of every optimizer's grid.

    Args:
        parser: where to.
        default: the rates; `None` for the optimizers' own.
    """
    parser.add_argument(
        "--rates",
        nargs="+",
        type=_rate,
        default=default,
        metavar="RATE",
        help="instead of every grid, in units of its scale (Lion's is a tenth); what looks for its "
        "rate itself starts where it comes with (default: "
        f"{'every grid' if default is None else ' '.join(f'{rate:g}' for rate in default)})",
    )


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0.0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"--rates must be above 0 and finite, got {text}")
    return rate


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
            train what only JAX can.
    """

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console
        data = options.data
        self.data = None if data is None else str(data)
        self.workload: Workload = load(options.workload, self.data, options.framework)
        self.steps: int = options.steps or self.workload.steps
        if self.steps % 4:
            raise ValueError(f"--steps must be a multiple of 4, got {self.steps}.")
        self.seeds = tuple(range(options.first_seed, options.first_seed + options.seeds))
        there = _registry(options.framework)
        names = options.optimizer or [name for name in options.usual if name in there]
        self.optimizers = [self.named(name) for name in names]

    def named(self, optimizer: str) -> str:
        """An optimizer's name in full: "torch:NAME" in PyTorch, NAME in JAX.

        Raises:
            ValueError: if there is no such optimizer, or its framework does not have the workload.
        """
        framework, colon, name = optimizer.rpartition(":")
        framework = framework if colon else self.options.framework
        full = name if framework == "jax" else f"{framework}:{name}"
        label(full)
        if framework != self.options.framework:
            load(self.options.workload, self.data, framework)
        return full

    def rates(self, optimizer: str) -> tuple[float, ...]:
        """What is tried of an optimizer: its grid, or what `--rates` says instead."""
        given = getattr(self.options, "rates", None)
        if given is None:
            return rates(optimizer)
        found = entry(*split(optimizer))
        if looks_for_its_rate(optimizer):
            return (found.default,)
        return scaled(tuple(sorted(set(given))), found.scale)

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
        workers = self.options.workers
        if workers is None:
            on_cpu = device(self.options.framework).startswith("cpu")
            workers = os.cpu_count() or 1 if on_cpu else 0
        return sweep(tasks, store, workers=workers, console=self.console)

    def over_grid(
        self, optimizers: Iterable[str], seeds: Sequence[int] | None = None
    ) -> dict[str, dict[float, dict[int, Record]]]:
        """Every optimizer at every rate of its grid, by name, rate and seed."""
        seeds = self.seeds if seeds is None else seeds
        wanted = {
            (name, rate, seed): self.task(name, rate, seed)
            for name in optimizers
            for rate in self.rates(name)
            for seed in seeds
        }
        runs = self.run(wanted.values())
        return {
            name: {
                rate: {seed: runs[wanted[name, rate, seed]] for seed in seeds}
                for rate in self.rates(name)
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
        """What was trained, for the figures; other steps or another framework are another part."""
        part = self.workload.name
        if self.steps != self.workload.steps:
            part += f"-{self.steps}-steps"
        if self.options.framework != "jax":
            part += f"-{self.options.framework}"
        return {
            "part": part,
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
    if framework not in FRAMEWORKS:
        raise ValueError(f"--optimizer must be NAME, jax:NAME or torch:NAME, got {optimizer!r}.")
    try:
        found = entry(framework, name).label
    except KeyError as error:
        raise ValueError(
            f"--optimizer must be one of {', '.join(known(framework))}, got {name!r}."
        ) from error
    return f"{found} (PyTorch)" if framework == "torch" else found


def known(framework: str) -> list[str]:
    """Every name of a framework's registry."""
    return [f"torch:{name}" if framework == "torch" else name for name in _registry(framework)]


def _registry(framework: str) -> Mapping[str, Any]:
    return room(framework, "our_optimizers", FRAMEWORKS[framework]).OPTIMIZERS


def looks_for_its_rate(optimizer: str) -> bool:
    """Whether its grid is one of starts, none of which is tuned."""
    return split(optimizer)[1].startswith("self_driving")


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
