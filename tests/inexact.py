"""Arrays of NumPy whose quotients are off, as those of float32 by XLA on a GPU may be."""

import numpy as np


def dividing(units):
    """A class of arrays whose float32 quotients are so many units in the last place too high."""

    class Dividing(np.ndarray):
        def __truediv__(self, other):
            found = np.divide(np.asarray(self), np.asarray(other), dtype=np.float32)
            return (
                np.asarray(found.view(np.int32) + units, np.int32).view(np.float32).view(Dividing)
            )

    return Dividing
