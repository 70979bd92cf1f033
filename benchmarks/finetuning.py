"""What each optimizer makes of a model that has learned before, over a grid of rates."""

import argparse

from benchmarks import rate_sensitivity
from benchmarks._comparison import add_arguments

OPTIMIZERS = (
    "self_driving",
    "self_driving-lion",
    "scheduled",
    "meta3",
    "meta_lion",
    "adamw",
    "adamw-cosine",
    "lion-cosine",
    "schedule-free",
    "prodigy",
)


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, optimizers=OPTIMIZERS, workload="finetuning")


PROTOCOL = rate_sensitivity.PROTOCOL._replace(
    name="finetuning",
    title="Fine-tuning.",
    reading=(
        "A small vision transformer that has learned the digits upright goes on with 200 of them "
        "turned by a quarter. The table reads like that of the learning-rate sensitivity. A rate "
        "that is too high costs what the model had learned."
    ),
    arguments=_arguments,
)
