"""What activations in 8 and 4 bits cost in held-out loss."""

import argparse
from typing import Any

from rich.console import Console

from benchmarks import ablation
from benchmarks._protocol import Protocol

WHOLES = ("meta3", "meta_lion")
"""What is trained with exact activations."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    ablation.add_whole(parser, WHOLES, "what activations are exact for")
    parser.set_defaults(framework="torch")


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    if options.framework != "torch":
        raise ValueError(
            f"--framework must be torch, got {options.framework}; compress_activations() is of "
            "cruxy_torch."
        )
    options.optimizer = options.optimizer or [
        f"{options.whole}-activations{bits}" for bits in (8, 4)
    ]
    return ablation.PROTOCOL.measure(options, console)


PROTOCOL: Protocol = ablation.PROTOCOL._replace(
    name="activations",
    title="Activations in 8 and 4 bits.",
    reading=(
        "What autograd keeps for the backward pass is kept in 8 or 4 bits an element "
        "(`compress_activations`). A positive difference, paired by seed, is what it costs."
    ),
    arguments=_arguments,
    measure=_measure,
)
