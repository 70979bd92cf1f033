"""What an average of the parameters in 16 and 8 bits costs in held-out loss."""

from benchmarks import ablation
from benchmarks._protocol import Protocol

WHOLES = {
    name: tuple(f"{name}-average-{bits}bit" for bits in (16, 8))
    for name in ("self_driving", "self_driving-lion", "self_driving-muon")
}
"""Self-driving with an average in float32, and with one in fewer bits."""

PROTOCOL: Protocol = ablation.among(
    WHOLES, "whose average is kept", workload="shakespeare-small", seeds=3
)._replace(
    name="averages",
    title="The average in 16 and 8 bits.",
    reading=(
        "Self-driving with `average_bits` 16 and 8 against an average in float32, each evaluated "
        "at its average. Training is the same to the bit: a difference, paired by seed, is what "
        "the bits of the average cost. The seeds are none on which anything was chosen."
    ),
)
