"""One short name for the bits of a whole model: 16 hexadecimal digits of a SHA-256."""

import hashlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from cruxy_exact._namespace import is_torch

DEFINITION = "exact-1"
"""The definition of all operations of this package. A change of any bit needs a new one."""


def checksum(tree: Any, *, bits: int = 20, grain: int | None = None, xp: Any) -> str:
    """The checksum of a tree of float32 arrays.

    It sees names, shapes, numbers and how the run was defined, not layout, device or sharding.

    Args:
        tree: mappings, lists and tuples of arrays. Their keys, joined by dots, are the names.
        bits: of the matrix products.
        grain: samples in a grain; `None` where gradients were not accumulated in grains.
        xp: the array namespace of the arrays.

    Returns:
        16 hexadecimal digits.

    Raises:
        TypeError: where an array is not float32.

    Examples:
        >>> import numpy as np
        >>> checksum({"w": np.ones((2, 3), np.float32)}, xp=np)
        '...'
    """
    digest = hashlib.sha256(f"{DEFINITION} bits={bits} grain={grain}\n".encode())
    for name, x in sorted(names(tree)):
        digest.update(f"{name}:{tuple(x.shape)}".encode())
        digest.update(to_bytes(name, x, xp=xp))
    return digest.hexdigest()[:16]


def names(tree: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """The arrays of a tree with their names."""
    if isinstance(tree, Mapping):
        items = [(str(key), part) for key, part in tree.items()]
    elif isinstance(tree, list | tuple):
        items = [(str(i), part) for i, part in enumerate(tree)]
    else:
        yield above, tree
        return
    for key, part in items:
        yield from names(part, f"{above}.{key}" if above else key)


def to_bytes(name: str, x: Any, *, xp: Any) -> bytes:
    """The little-endian float32 bytes of an array, row by row; every NaN is the same one.

    Raises:
        TypeError: where it is not float32.
    """
    if x.dtype != xp.float32:
        raise TypeError(
            f"a checksum is of float32 arrays, got {x.dtype} in {name!r}; keep it out of the tree."
        )
    x = xp.where(x == x, x, xp.full_like(x, float("nan")))
    if is_torch(xp):
        x = x.detach().cpu().numpy()
    x = x.__array__()
    if sys.byteorder == "big":
        x = x.byteswap()
    return x.tobytes()
