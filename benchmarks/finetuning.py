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
    add_arguments(parser, optimizers=OPTIMIZERS, workload="finetuning-vit")


PROTOCOL = rate_sensitivity.PROTOCOL._replace(
    name="finetuning",
    title="Fine-tuning.",
    reading=(
        "Models that have learned go on with little of something else: a small vision transformer "
        "that reads digits with 200 of them turned by a quarter, the small GPT after Shakespeare "
        "with 34,000 characters of documentation. The table reads like that of the learning-rate "
        "sensitivity. A rate that is too high costs what the model had learned."
    ),
    arguments=_arguments,
)
