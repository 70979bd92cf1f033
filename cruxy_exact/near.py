"""Codes for a number that lies near a known one: its lowest digits, the rest is the other's.

Written once for `numpy`, `jax.numpy` and `torch`, which come as `xp`.
"""

import dataclasses
from typing import Any

from cruxy_exact._namespace import cast

_FINEST, _COARSEST = 2.0**-60, 2.0**60
"""Between these lies what a grid is chosen for: finer ones would overflow beside a large number."""

_ROOM = {16: 16.0, 8: 2.0}
"""How many times as far as now a number may come to lie from the known one, at least."""


@dataclasses.dataclass(frozen=True)
class NearCode:
    r"""How the numbers of one block are kept where each has a known number nearby.

    All numbers $a$ of a block are multiples of one step $g$, a power of two, and the code of one is
    the lowest `bits` bits of $a / g$. What is above them is read off the known number $p$: $a$ is
    the multiple of $g$ nearest to $p$ with these bits. That is right as long as $|a - p|$ is below
    $2^{bits - 1} g$, however $p$ moves: **nothing has to be coded again because of it**, and
    rounding only comes in where $a$ itself moves. A number that comes to lie further from $p$ is
    read wrongly, but never further from it than that.

    A slow average beside what it averages is such a number. Rounded by chance, one that moves
    towards $p$ by the share $w$ in each step gathers the variance $g |a - p| / 2$, however small
    $w$ is and however many steps that takes: a move below $g$ is made in whole steps, and seldom.
    The code of an offset $a - p$, which changes with every $p$ and is rounded every time, gathers
    one in proportion to $1 / w$.

    Attributes:
        bits: bits an element, 16 or 8.

    Raises:
        ValueError: where `bits` is neither 16 nor 8.

    Examples:
        >>> import numpy as np
        >>> code = NearCode(bits=8)
        >>> old, new = np.float32([1.0, -3.0]), np.float32([1.5, -3.1])
        >>> grid = code.grid(np.float32(0.25), np.float32(1.0), xp=np)
        >>> codes = code.encode(np.float32([0.25, -0.125]), old, grid, 0.5, xp=np)
        >>> print(new + code.offset(codes, new, grid, xp=np))
        [ 1.25  -3.125]
    """

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in _ROOM:
            raise ValueError(f"bits must be 16 or 8, got {self.bits!r}; use 16 if in doubt.")

    @property
    def span(self) -> float:
        """In steps, how far apart numbers of the same code are."""
        return 2.0**self.bits

    def grid(self, reach: Any, grid: Any, *, xp: Any) -> Any:
        """The step of a block, which is left as it is where it fits: a change of it rounds anew.

        Args:
            reach: the largest distance in the block, at least 0; float32, any shape.
            grid: the step so far, a power of two; float32, of the same shape.
            xp: the array namespace.

        Returns:
            float32 of the same shape, a power of two, which bfloat16 holds exactly.
        """
        reach = xp.clip(cast(reach, xp.float32), _FINEST, _COARSEST)
        below = (reach.view(xp.int32) & 0x7F800000).view(xp.float32)  # the power of two
        least = below * (4.0 * _ROOM[self.bits] / self.span)
        return xp.where(grid < least, least, xp.where(grid > 2.0 * least, 2.0 * least, grid))

    def first_reach(self, largest: Any, *, xp: Any) -> Any:
        """What the first `grid` is for, where nothing is known of how numbers will move.

        A step is taken to move a parameter by less than an eighth of the largest in its block, or
        of 1/128 where all are small. What is read wrongly until the grid fits is forgotten by an
        average that has just begun.

        Args:
            largest: the largest magnitude in the block; float32, any shape.
            xp: the array namespace.
        """
        return xp.clip(largest, 2.0**-7, _COARSEST) * 0.125

    def offset(self, codes: Any, near: Any, grid: Any, *, xp: Any) -> Any:
        """How far numbers are from the known ones: `a - p`.

        Args:
            codes: from `encode`.
            near: the known numbers; float32 or float64, of the same shape.
            grid: of their blocks, broadcast against `codes`.
            xp: the array namespace.

        Returns:
            Of the dtype and shape of `near`.
        """
        whole, rest = self._digits(near, grid, xp)
        apart = cast(codes, near.dtype) - whole
        return (self._wrapped(apart, xp) - rest) * grid

    def encode(self, offset: Any, near: Any, grid: Any, noise: Any, *, xp: Any) -> Any:
        """The codes of numbers that are so far from the known ones.

        Args:
            offset: `a - p`; of the dtype of `near`.
            near: as for `offset`, as all that follows.
            grid: of their blocks.
            noise: 0.5 for the nearest multiple of the step, numbers from `noise` for rounding by
                chance.
            xp: the array namespace.

        Returns:
            int8 or int16 of the shape of `near`.
        """
        whole, rest = self._digits(near, grid, xp)
        number = whole + xp.floor(rest + offset / grid + noise)
        return cast(self._wrapped(number, xp), xp.int8 if self.bits == 8 else xp.int16)

    def noise(self, bits: Any, *, xp: Any) -> Any:
        """Random bits as `noise` for `encode`: float32 in [0, 1), of the same shape.

        Args:
            bits: from `cruxy_exact.random_bits.random_bits`; int32, any shape.
            xp: the array namespace.
        """
        return cast((bits >> 8) & 0xFFFFFF, xp.float32) * 2.0**-24

    def _digits(self, near: Any, grid: Any, xp: Any) -> tuple[Any, Any]:
        """The lowest digits of a number in steps: the whole ones, and what is behind the point."""
        steps = near / grid
        whole = xp.floor(steps)
        return whole - self.span * xp.floor(whole / self.span), steps - whole

    def _wrapped(self, number: Any, xp: Any) -> Any:
        """The one of the numbers `span` apart that is nearest to 0."""
        return number - self.span * xp.floor(number / self.span + 0.5)
