"""What each of Tiger's components is worth, beside what it is added to, over a grid of rates."""

import argparse

from benchmarks import rate_sensitivity
from benchmarks._comparison import add_arguments

OPTIMIZERS = (
    "meta3",
    "meta3-tiger-rates",
    "meta3-slices",
    "meta3-balanced-slices",
    "meta3-agc",
    "meta3-clip-rms",
    "meta3-trust",
    "meta_lion",
    "tiger",
    "tiger-no-blend",
    "tiger-soft",
    "tiger-trust",
    "tiger-momentum-trust",
    "tiger-half-power",
    "tiger-agc",
    "tiger-guard",
    "axiom-relative",
    "axiom-half-power",
)
"""What a component is added to stands before it. Those of LoRA are for `finetuning-lora`."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, optimizers=OPTIMIZERS, first_seed=3)


PROTOCOL = rate_sensitivity.PROTOCOL._replace(
    name="components",
    title="Tiger's components.",
    reading=(
        "Each component of Tiger added to Meta3, to `tiger`, or to AXIOM. The table reads like "
        "that of the learning-rate sensitivity: every row at its own best rate of a grid. A "
        "component that does not end below what it was added to is worth nothing here."
    ),
    arguments=_arguments,
)
