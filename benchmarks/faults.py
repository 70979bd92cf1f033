"""Bad batches on purpose: how they are called, and at which few steps they strike."""

from typing import NamedTuple


class Fault(NamedTuple):
    """One kind of bad batch; `benchmarks/_jax/faults.py` says what it does.

    Attributes:
        label: for tables.
        lasts: how many steps each strike lasts; they come at two, four and six tenths of a run.
    """

    label: str
    lasts: int = 1

    def strikes(self, steps: int) -> tuple[int, ...]:
        """The steps, counted from 0, that are hit in a run of `steps`."""
        return tuple(share * steps // 10 + i for share in (2, 4, 6) for i in range(self.lasts))


FAULTS = {
    "none": Fault("clean"),
    "times-10": Fault("gradients times 10"),
    "times-100": Fault("gradients times 100"),
    "times-1000": Fault("gradients times 1000"),
    "twice-1000": Fault("times 1000, two steps running", lasts=2),
    "huge": Fault("one element 1e30"),
    "nan": Fault("NaN in one leaf"),
    "inf": Fault("Inf in one leaf"),
    "labels": Fault("labels shuffled"),
}
"""Every fault by name."""
