"""What a relative limit that gives way is worth to self-driving."""

from benchmarks import ablation
from benchmarks._protocol import Protocol

WHOLES = {
    "self_driving-held": ("self_driving-yield-20", "self_driving-yield-50"),
    "self_driving-lion-held": ("self_driving-lion-yield-50",),
    "self_driving-muon-held": ("self_driving-muon-yield-50",),
}
"""Self-driving under a limit that holds, and with limits that give way."""

PROTOCOL: Protocol = ablation.among(
    WHOLES, "what runs under a limit that holds", workload="cartpole", seeds=8
)._replace(
    name="yielding",
    title="A relative limit that gives way.",
    reading=(
        "Self-driving with `SelfDriving(limit_yield=)` against the limit that holds. A negative "
        "difference, paired by seed, is a gain; one within twice its error of zero is none. The "
        "seeds are none on which the constants were chosen, but for CartPole's 3 to 10, on which "
        "the 50 was."
    ),
)
