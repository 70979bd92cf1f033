"""What rates by role are worth to self-driving: one role's rate changed at a time."""

import argparse
from typing import Any

from rich.console import Console

from benchmarks import ablation
from benchmarks._comparison import add_arguments
from benchmarks._protocol import Protocol

WHOLES = {
    "self_driving": (
        "self_driving-embedding-third",
        "self_driving-norm-thrice",
        "self_driving-embedding-third-norm-thrice",
        "self_driving-head-third",
    ),
    "self_driving-ended": ("self_driving-ended-embedding-third",),
    "self_driving-muon": ("self_driving-muon-embedding-third",),
    "self_driving-muon-ended": ("self_driving-muon-ended-embedding-third",),
}
"""What gets rates by role, and the variants of each."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, optimizers=None, first_seed=3)
    parser.add_argument(
        "--whole",
        choices=WHOLES,
        default="self_driving",
        help="what gets rates by role (default: %(default)s)",
    )
    parser.set_defaults(rate=None)


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    options.optimizer = options.optimizer or [*WHOLES[options.whole]]
    return ablation.PROTOCOL.measure(options, console)


PROTOCOL: Protocol = ablation.PROTOCOL._replace(
    name="roles",
    title="Rates by role under self-driving.",
    reading=(
        "Self-driving finds one rate for all; here embeddings, normalizations or the output layer "
        "get a multiple of it, by `scale_by_role`. A negative difference, paired by seed, is a "
        "gain; one within twice its error of zero is none. The seeds are none on which the "
        "multiples were chosen. A model that has no such role shows a zero."
    ),
    arguments=_arguments,
    measure=_measure,
)
