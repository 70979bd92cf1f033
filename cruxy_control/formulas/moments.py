"""The bias of averages that began at zero."""

from typing import Any


def seen(product: Any, *, xp: Any) -> Any:
    """The weight of what a moment has seen, `1 - product`; 1 where it has seen nothing.

    Args:
        product: of its decay rates so far, in `[0, 1]`.
        xp: the array namespace.

    Examples:
        >>> import numpy as np
        >>> seen(np.array([1.0, 0.9, 0.0]), xp=np).round(1)
        array([1. , 0.1, 1. ])
    """
    return xp.where(product < 1.0, 1.0 - product, 1.0)
