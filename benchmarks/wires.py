"""What a compressed wire costs in held-out loss: codes with and without feedback, and the vote."""

import argparse
from typing import Any

from rich.console import Console

from benchmarks import ablation
from benchmarks._protocol import Protocol

_CODES = ("wire8", "wire4", "wire8-feedback", "wire4-feedback")

VARIANTS = {
    "meta3": tuple(f"meta3-{code}" for code in _CODES),
    "meta_lion": (*(f"meta_lion-{code}" for code in _CODES), "meta_lion-vote"),
    "lion": ("lion-vote",),
}
"""What is trained with an exact mean, and its variants."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    ablation.add_whole(parser, VARIANTS, "what the mean of gradients is exact for")
    parser.set_defaults(framework="jax")


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    if options.framework != "jax":
        raise ValueError(
            f"--framework must be jax, got {options.framework}; workers are laid out by jax.vmap."
        )
    options.optimizer = options.optimizer or list(VARIANTS[options.whole])
    return ablation.PROTOCOL.measure(options, console)


PROTOCOL: Protocol = ablation.PROTOCOL._replace(
    name="wires",
    title="Gradients over a compressed wire.",
    reading=(
        "Four workers share every batch. Of the first row the mean of their gradients is exact; in "
        "the others it is sent in 8 or 4 bits an element (`average_gradients`), with what coding "
        "has lost added to the next gradient or not, or the workers vote on the sign of each "
        "element (`meta_lion(vote=)`; Lion by vote has a law that orders nothing). A positive "
        "difference, paired by seed, is what it costs."
    ),
    arguments=_arguments,
    measure=_measure,
)
