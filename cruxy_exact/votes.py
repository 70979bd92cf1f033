"""Votes of one bit: what a rank votes, how eight votes share a byte, and what the majority is.

Written once for `numpy`, `jax.numpy` and `torch`, which come as `xp`: see `cruxy_exact.codes`.
"""

from typing import Any

from cruxy_exact._namespace import cast
from cruxy_exact.random_bits import random_bits, stream_key


def coins(step: Any, seed: int, leaf: int, index: Any, *, xp: Any) -> Any:
    """The coin of each element, which all ranks throw alike and which turns over every step.

    What nobody pushes is moved to and fro and stays where it is on average, in every two steps.

    Args:
        step: number of the step; int32 array, `()`.
        seed: tells runs apart; any whole number.
        leaf: tells the leaves of one run apart; a whole number.
        index: the row-major number of each element in its leaf; int32, any shape.
        xp: the array namespace.

    Returns:
        Booleans of the shape of `index`.
    """
    bits = random_bits(stream_key(step * 0, seed, leaf, xp=xp), index)
    return (bits < 0) ^ ((step & 1) > 0)


def ballots(c: Any, coin: Any, *, xp: Any) -> Any:
    """What a rank votes: whether `c` is above 0; where it is 0, the coin.

    Args:
        c: of any shape and floating dtype; NaN votes for below.
        coin: from `coins`, of the same shape.
        xp: the array namespace.

    Returns:
        Booleans of the same shape.
    """
    return xp.where(c == 0.0, coin, c > 0.0)


def majority(ayes: Any, voters: int, coin: Any, *, xp: Any) -> Any:
    """What most ranks voted, the coin in a tie.

    Args:
        ayes: how many voted for above; integers, any shape.
        voters: how many voted.
        coin: from `coins`, of the same shape.
        xp: the array namespace.

    Returns:
        Booleans of the same shape.

    Examples:
        >>> import numpy as np
        >>> votes = np.array([[True, True, False], [True, False, False]])
        >>> coin = np.array([False, True, True])
        >>> print(majority(votes.sum(0), 2, coin, xp=np))
        [ True  True False]
    """
    return xp.where(2 * ayes == voters, coin, 2 * ayes > voters)


def pack_votes(votes: Any, *, xp: Any) -> Any:
    """Eight votes to a byte: those an eighth of the last axis apart.

    Args:
        votes: booleans; the last axis is a multiple of 8.
        xp: the array namespace.

    Returns:
        uint8, the last axis an eighth as long.
    """
    planes = cast(votes, xp.uint8).reshape((*votes.shape[:-1], 8, votes.shape[-1] // 8))
    packed = planes[..., 0, :]
    for bit in range(1, 8):
        packed = packed | (planes[..., bit, :] << bit)
    return packed


def unpack_votes(packed: Any, *, xp: Any) -> Any:
    """The votes that `pack_votes` was given."""
    planes = [(packed >> bit) & 1 for bit in range(8)]
    return xp.concatenate(planes, -1) > 0
