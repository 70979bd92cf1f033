"""Where the queries, keys and values lie in a tensor that holds all of them."""

from typing import NamedTuple

from cruxy_control.checks import check_count

Ranges = tuple[tuple[int, int], ...]


class Slices(NamedTuple):
    """Where queries, keys and values lie along one axis of a fused tensor.

    Attributes:
        axis: the axis, from 0.
        q: the ranges `(start, stop)` of indices that make queries, in the order of the heads.
        k: those of the keys.
        v: those of the values.

    Examples:
        >>> from cruxy_control.slices import Slices
        >>> Slices(axis=0, q=((0, 8),), k=((8, 12),), v=((12, 16),)).sizes
        {'q': 8, 'k': 4, 'v': 4}
    """

    axis: int
    q: Ranges
    k: Ranges
    v: Ranges

    @property
    def sizes(self) -> dict[str, int]:
        """How many indices each of the three has."""
        return {name: sum(stop - start for start, stop in part) for name, part in self.parts()}

    def parts(self) -> tuple[tuple[str, Ranges], ...]:
        """The three, by name."""
        return ("q", self.q), ("k", self.k), ("v", self.v)


def repeated(
    q: int, k: int, v: int, *, times: int = 1, order: str = "qkv", axis: int = 0
) -> Slices:
    """Blocks of queries, keys and values that follow each other, and do so again.

    Args:
        q: indices in one block of queries; 0 where the tensor holds none.
        k: those in one block of keys.
        v: those in one block of values.
        times: how often the three blocks follow each other.
        order: in which order they do.
        axis: along which axis.

    Examples:
        >>> from cruxy_control.slices import repeated
        >>> repeated(4, 2, 2, times=2)
        Slices(axis=0, q=((0, 4), (8, 12)), k=((4, 6), (12, 14)), v=((6, 8), (14, 16)))
    """
    widths = {"q": q, "k": k, "v": v}
    for name, width in widths.items():
        check_count(name, width, 0, remedy="it is how many indices one block has")
    check_count("times", times, 1, remedy="1 is blocks that follow each other once")
    if sorted(order) != ["k", "q", "v"]:
        raise ValueError(f'order must be one of q, k and v, got {order!r}; "qkv" is usual.')
    ranges: dict[str, list[tuple[int, int]]] = {"q": [], "k": [], "v": []}
    start = 0
    for name in order * times:
        if widths[name]:
            ranges[name].append((start, start + widths[name]))
        start += widths[name]
    return Slices(axis, *(tuple(ranges[name]) for name in "qkv"))


def blocks(q: int, k: int, v: int, *, axis: int = 0) -> Slices:
    """All queries, then all keys, then all values: GPT-2 (axis 1), Phi-3, PyTorch's `in_proj`.

    Examples:
        >>> from cruxy_control.slices import blocks
        >>> blocks(8, 4, 4)
        Slices(axis=0, q=((0, 8),), k=((8, 12),), v=((12, 16),))
    """
    return repeated(q, k, v, axis=axis)


def per_head(heads: int, size: int, *, axis: int = 0) -> Slices:
    """Each head's query, key and value together, as in GPT-NeoX and BLOOM: `(heads, 3, size)`."""
    return repeated(size, size, size, times=heads, axis=axis)


def per_group(groups: int, queries: int, size: int, *, axis: int = 0) -> Slices:
    """Each group's queries, then its one key and value: Falcon's `(groups, queries + 2, size)`.

    Args:
        groups: how many heads of keys and values there are.
        queries: how many heads of queries share each of them.
        size: of a head.
        axis: along which axis.
    """
    return repeated(queries * size, size, size, times=groups, axis=axis)


def check_slices(name: str, slices: Slices, shape: tuple[int, ...]) -> None:
    """Raises unless the ranges fill their axis of a tensor, each index once.

    Args:
        name: of the tensor, for the message.
        slices: where q, k and v are said to lie.
        shape: the tensor's.

    Raises:
        TypeError: where it is no `Slices`.
        ValueError: with what the ranges have, what the axis has, and what to do.
    """
    if not isinstance(slices, Slices):
        raise TypeError(
            f"where q, k and v lie in {name} must be a Slices, got {slices!r}; "
            "cruxy_control.slices.blocks makes one."
        )
    remedy = f'say where they lie, with slices={{"{name}": cruxy_control.slices.blocks(...)}}'
    if not 0 <= slices.axis < len(shape):
        raise ValueError(
            f"q, k and v must lie along an axis of {name}, got axis {slices.axis} of shape "
            f"{shape}; {remedy}."
        )
    size, counts = shape[slices.axis], slices.sizes
    ranges = sorted(one for _, part in slices.parts() for one in part)
    ends = [0, *(stop for _, stop in ranges)]
    fill = [start for start, _ in ranges] == ends[:-1] and all(a < b for a, b in ranges)
    if not fill or ends[-1] != size:
        raise ValueError(
            f"q, k and v must fill axis {slices.axis} of {name} without gap or overlap, got "
            f"{counts['q']} + {counts['k']} + {counts['v']} = {sum(counts.values())} indices for "
            f"a size of {size}; {remedy}."
        )
