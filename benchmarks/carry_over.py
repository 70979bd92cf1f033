"""Whether the same constants hold on other workloads, in other widths and with other batches."""

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
    "schedule-free-0.95",
    "prodigy",
)

RIVALS = ("sf-normuon", "soap-cosine", "amuse")
"""Written from their equations; what is asked for by name."""

FEW_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Around what is best on the small GPT."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, optimizers=OPTIMIZERS, workload="char-lstm", first_seed=3)
    add_rates(parser, FEW_RATES)


PROTOCOL = rate_sensitivity.PROTOCOL._replace(
    name="carry-over",
    title="Other workloads, other widths, other batches.",
    reading=(
        "Self-driving from its usual start, with and without a known end, and Prodigy, beside "
        "optimizers whose rate is tuned anew on every one, by five rates around what is best on "
        "the small GPT. The table reads like that of the learning-rate sensitivity; edge says that "
        "a better rate may lie beyond the five."
    ),
    arguments=_arguments,
)
