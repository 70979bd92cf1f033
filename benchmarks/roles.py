"""What rates by role are worth to self-driving: one role's rate changed at a time."""

import argparse

from benchmarks import ablation
from benchmarks._comparison import add_arguments
from benchmarks._protocol import Protocol

OPTIMIZERS = (
    "self_driving-embedding-third",
    "self_driving-norm-thrice",
    "self_driving-embedding-third-norm-thrice",
    "self_driving-head-third",
)


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, optimizers=OPTIMIZERS, first_seed=3)
    parser.set_defaults(whole="self_driving", rate=None, optimizer=list(OPTIMIZERS))


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
)
