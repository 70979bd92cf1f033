"""What the benchmarks of time, memory and resumption share: optimizers to measure, and options."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks._frameworks import FRAMEWORKS, installed, missing, needs, room
from benchmarks.workloads import ALONE
from benchmarks.workloads import NAMES as WORKLOADS

REFERENCE = "adamw"
"""What ratios are taken to, in both frameworks."""

MODELS = tuple(name for name in WORKLOADS if name not in ALONE)
"""The workloads that both frameworks train."""


class MeasuredOptimizer(NamedTuple):
    """An optimizer whose cost is measured.

    Attributes:
        label: for tables and plots.
        make: in JAX, from nothing to a transformation; in PyTorch, from a model to an optimizer.
            Made anew at every call.
        ours: whether it is this project's.
        check: raises a ValueError where it cannot be made here, for want of a package say.
    """

    label: str
    make: Callable[..., Any]
    ours: bool = False
    check: Callable[[], object] = lambda: None


def registry(framework: str) -> Mapping[str, MeasuredOptimizer]:
    """The optimizers of a framework by name; the framework is imported only now."""
    return room(framework, "measured_optimizers", FRAMEWORKS[framework]).OPTIMIZERS


def add_arguments(parser: argparse.ArgumentParser, *, ours_alone: bool = False) -> None:
    """Adds the options that choose frameworks, optimizers and the text.

    Args:
        parser: where to.
        ours_alone: whether by default only ours are compared with the reference, not all.
    """
    there = installed() or [*FRAMEWORKS]
    usual = {framework: _usual(registry(framework), ours_alone) for framework in installed()}
    listed = "; ".join(f"{FRAMEWORKS[f]}: {' '.join(names)}" for f, names in usual.items())
    parser.add_argument(
        "--framework",
        nargs="+",
        choices=FRAMEWORKS,
        default=there,
        help=f"default: {' '.join(there)}",
    )
    parser.add_argument(
        "--optimizer",
        nargs="+",
        metavar="NAME",
        help=f"each is taken in every framework that has it; default: {listed}",
    )
    parser.set_defaults(ours_alone=ours_alone)
    parser.add_argument("--data", type=Path, help="a text file instead of the plays")


def _usual(entries: Mapping[str, MeasuredOptimizer], ours_alone: bool) -> list[str]:
    return [n for n, entry in entries.items() if entry.ours or n == REFERENCE or not ours_alone]


def whole(text: str, option: str, least: int) -> int:
    """The value of an option that is a whole number.

    Raises:
        argparse.ArgumentTypeError: if it is none, or below `least`.
    """
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(
            f"{option} must be a whole number of at least {least}, got {text}"
        )
    return int(text)


def chosen(options: argparse.Namespace, console: Console) -> dict[str, list[str]]:
    """The optimizers of each framework, the reference first.

    One that cannot be made here is an error where it was asked for, and else left out.

    Args:
        options: as `add_arguments` made them.
        console: where it is said which are left out.

    Raises:
        ValueError: if a framework is not installed, no framework has one of the optimizers, or one
            that was asked for cannot be made.
    """
    for framework in options.framework:
        if (package := missing(framework)) is not None:
            raise ValueError(needs(f"--framework {framework}", package, framework))
    found = {f: registry(f) for f in dict.fromkeys(options.framework)}
    known = list(dict.fromkeys(name for names in found.values() for name in names))
    for name in options.optimizer or ():
        if name not in known:
            raise ValueError(f"--optimizer must be one of {', '.join(known)}, got {name!r}.")
    wanted: dict[str, list[str]] = {}
    for framework, entries in found.items():
        names = options.optimizer or _usual(entries, options.ours_alone)
        wanted[framework] = [REFERENCE]
        for name in dict.fromkeys(names):
            if name == REFERENCE or name not in entries:
                continue
            try:
                entries[name].check()
            except ValueError as error:
                if options.optimizer:
                    raise
                console.print(f"{name} is left out: {error}", markup=False)
            else:
                wanted[framework].append(name)
    return wanted


def part(name: str, options: argparse.Namespace) -> str:
    """Names the file of these figures: those of one framework do not replace those of both."""
    chosen = set(options.framework)
    return name if chosen == set(FRAMEWORKS) else "-".join([name, *sorted(chosen)])
