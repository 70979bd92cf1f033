"""What rates by role are worth to self-driving: one role's rate changed at a time."""

from benchmarks import ablation
from benchmarks._protocol import Protocol

WHOLES = {
    "self_driving": (
        "self_driving-embedding-third",
        "self_driving-norm-thrice",
        "self_driving-embedding-third-norm-thrice",
        "self_driving-head-third",
    ),
    "self_driving-ended": ("self_driving-ended-embedding-third",),
    "self_driving-muon": ("self_driving-muon-embedding-third",),
    "self_driving-muon-ended": ("self_driving-muon-ended-embedding-third",),
}
"""What gets rates by role, and the variants of each."""


PROTOCOL: Protocol = ablation.among(
    WHOLES, "what gets rates by role", workload="shakespeare-small", seeds=3
)._replace(
    name="roles",
    title="Rates by role under self-driving.",
    reading=(
        "Self-driving finds one rate for all; here embeddings, normalizations or the output layer "
        "get a multiple of it, by `scale_by_role`. A negative difference, paired by seed, is a "
        "gain; one within twice its error of zero is none. The seeds are none on which the "
        "multiples were chosen. A model that has no such role shows a zero."
    ),
)
