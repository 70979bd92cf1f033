"""What knowing when the run ends is worth, beside optimizers whose rate is tuned for it."""

import argparse

from benchmarks import rate_sensitivity
from benchmarks._comparison import add_arguments, add_rates

OPTIMIZERS = (
    "self_driving-muon-ended",
    "self_driving-ended",
    "self_driving-lion-ended",
    "self_driving-muon-linear",
    "self_driving-linear",
    "self_driving-muon",
    "scheduled-muon",
    "muon-cosine",
    "scheduled",
    "adamw-cosine",
)


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, optimizers=OPTIMIZERS, first_seed=3)
    add_rates(parser)


PROTOCOL = rate_sensitivity.PROTOCOL._replace(
    name="horizon",
    title="A known end.",
    reading=(
        "Self-driving that is told when the run ends, that is given a schedule, and that is "
        "neither, and optimizers under a warm-up and a cosine to that end, whose peak is tuned. "
        "The table reads like that of the learning-rate sensitivity; self-driving's grid is where "
        "it starts. The constants were chosen on the small GPT and seeds 0 to 2, which are not "
        "among these."
    ),
    arguments=_arguments,
)
