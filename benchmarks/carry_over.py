"""Whether the same constants hold in other widths and with other batches."""

import argparse

from benchmarks import rate_sensitivity
from benchmarks._comparison import add_arguments, add_rates

OPTIMIZERS = (
    "self_driving-muon-ended",
    "self_driving-ended",
    "self_driving-muon",
    "self_driving",
    "scheduled-muon",
    "adamw-cosine",
)

FEW_RATES = (3e-3, 1e-2, 3e-2)
"""Around what is best on the small GPT."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, optimizers=OPTIMIZERS, workload="shakespeare-width-384", first_seed=3)
    add_rates(parser, FEW_RATES)


PROTOCOL = rate_sensitivity.PROTOCOL._replace(
    name="carry-over",
    title="Other widths, other batches.",
    reading=(
        "Self-driving from its usual start, with and without a known end, beside optimizers whose "
        "rate is tuned anew for every width and batch, on three rates around what is best on the "
        "small GPT. The table reads like that of the learning-rate sensitivity; edge says that a "
        "better rate may lie beyond the three."
    ),
    arguments=_arguments,
)
