"""What a relative limit that gives way is worth to self-driving."""

import argparse

from benchmarks import ablation
from benchmarks._comparison import add_arguments
from benchmarks._protocol import Protocol

OPTIMIZERS = ("self_driving-yield-20", "self_driving-yield-50")


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, optimizers=OPTIMIZERS, workload="cartpole", seeds=8, first_seed=3)
    parser.set_defaults(whole="self_driving", rate=None, optimizer=list(OPTIMIZERS))


PROTOCOL: Protocol = ablation.PROTOCOL._replace(
    name="yielding",
    title="A relative limit that gives way.",
    reading=(
        "Self-driving with `SelfDriving(limit_yield=)` against the limit that holds. A negative "
        "difference, paired by seed, is a gain; one within twice its error of zero is none. The "
        "seeds are none on which the constants were chosen."
    ),
    arguments=_arguments,
)
