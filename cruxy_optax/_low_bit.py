"""`LowBitArray`: an array kept as low-bit codes, in blocks that follow its axes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from cruxy_exact.codes import BlockCode, lifted, nibble
from cruxy_exact.random_bits import random_bits
from cruxy_optax._distributed.axes import explicit_spec
from cruxy_optax._flax import tell_flax
from cruxy_optax._places import element_numbers
from cruxy_optax._tree import at, nodes_with_paths

LANES = 32
"""Elements of a block along the last axis, where other axes can hold the rest: enough for whole
vector registers, few enough to fit a column-sharded matrix."""


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """How an array is cut into blocks.

    A block is a tile with a power of two of elements along each axis, `LANES` along the last one
    and the rest along those before it: 8 x 32 on most matrices. Such blocks fit shards of any axis
    whose length on a device is a multiple of the tile's, so that neither scales nor codes ever
    cross devices. An array whose axes hold no such tile of at least half the block size is cut
    along its flattened elements.

    Attributes:
        shape: of the array.
        tile: of a block; one number alone where the array is flattened.
    """

    shape: tuple[int, ...]
    tile: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], block_size: int) -> "BlockLayout":
        """The layout of an array of a shape.

        Args:
            shape: of the array, of at least one axis.
            block_size: elements of a block, a power of two of at least `LANES`.
        """
        tile = [1] * len(shape)
        rest = block_size
        last = len(shape) - 1
        turns = [(last, LANES), *((axis, block_size) for axis in reversed(range(last)))]
        for axis, limit in (*turns, (last, block_size)):
            more = math.gcd(shape[axis] // tile[axis], min(limit, rest))
            tile[axis], rest = tile[axis] * more, rest // more
        if rest > 2:
            return cls(shape, (block_size,))
        return cls(shape, tuple(tile))

    def of_shard(self, shape: tuple[int, ...]) -> "BlockLayout":
        """The layout of a part of the array, where `jax.shard_map` shows no more of it."""
        return BlockLayout(shape, self.tile) if self.folded else self

    @property
    def folded(self) -> bool:
        """Whether the array itself is cut, rather than its flattened and padded elements."""
        return len(self.tile) == len(self.shape) and all(
            size % part == 0 for size, part in zip(self.shape, self.tile, strict=True)
        )

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape that is cut: the array's, or its length as a multiple of the block size."""
        if self.folded:
            return self.shape
        return (-(-math.prod(self.shape) // self.tile[0]) * self.tile[0],)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """One scale a block, in the order of the blocks."""
        return tuple(size // part for size, part in zip(self.grid, self.tile, strict=True))

    def cut(self, bits: int) -> "Cut":
        """How the grid is reshaped to be coded in so many bits.

        The last axis of a longer block is cut once more: two short reductions are vectorised where
        a long one is not.
        """
        shape: list[int] = []
        own: list[int] = []
        for blocks, part in zip(self.scale_shape, self.tile, strict=True):
            parts = [part // LANES, LANES] if part > LANES else [part]
            if bits == 4 and part > 1 and not any(shape[axis] > 1 for axis in own):
                parts = [2, parts[0] // 2, *parts[1:]]
            own += range(len(shape) + 1, len(shape) + 1 + len(parts))
            shape += (blocks, *parts)
        pair = next(axis for axis in own if shape[axis] > 1) if bits == 4 else None
        return Cut(tuple(shape), tuple(own), pair)

    def code_shape(self, bits: int) -> tuple[int, ...]:
        """The shape of the codes: the grid's, for 4 bits with the paired axis halved."""
        if bits == 8:
            return self.grid
        return tuple(n // 2 if axis == self.paired else n for axis, n in enumerate(self.grid))

    @property
    def paired(self) -> int:
        """The axis along which 4-bit codes share bytes, the first with a longer part of a block."""
        return next(axis for axis, part in enumerate(self.tile) if part > 1)


class Cut(NamedTuple):
    """A shape in which every block has axes of its own.

    Attributes:
        shape: one axis for the blocks along each axis of the grid, each followed by axes for the
            elements of a block.
        own: the axes of the elements.
        pair: the one of length 2 among them whose elements share a byte; `None` for 8 bits.
    """

    shape: tuple[int, ...]
    own: tuple[int, ...]
    pair: int | None

    def spread(self, x: jax.Array, *, ones: tuple[int, ...] = ()) -> jax.Array:
        """An array like the grid, the scales or the codes in this shape, `ones` of length 1."""
        shape = [1 if axis in ones else n for axis, n in enumerate(self.shape)]
        split = iter(explicit_spec(x))
        if not any(explicit_spec(x)):
            return x.reshape(shape)
        # On an explicit mesh JAX asks where the parts of a split axis lie: with its blocks.
        spec = [None if axis in self.own else next(split) for axis in range(len(shape))]
        return lax.reshape(x, shape, out_sharding=PartitionSpec(*spec))

    def gather(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The reverse of `spread`."""
        spec = explicit_spec(x)
        if not any(spec):
            return x.reshape(shape)
        whole = [part for axis, part in enumerate(spec) if axis not in self.own]
        return lax.reshape(x, shape, out_sharding=PartitionSpec(*whole))

    def largest(self, x: jax.Array) -> jax.Array:
        """The largest magnitude of each block, NaN where there is one; float32, axes kept.

        As integers, the bits of magnitudes are ordered like them and NaN is above infinity; unlike
        a maximum of floating numbers this one is vectorised and fused by XLA on a CPU.
        """
        word = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
        for axes in (self.own[:-1], self.own[-1:]):
            word = jnp.max(word, axis=axes, keepdims=True)
        return lax.bitcast_convert_type(word, jnp.float32)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales"],
    meta_fields=["code", "layout", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class LowBitArray:
    """An array kept as low-bit codes: a pytree of two arrays.

    Attributes:
        codes: of the array's shape, int8 or, non-negative, uint8; for 4 bits uint8 with one axis
            halved; of one axis where the array was flattened.
        scales: one a block, in the shape of the blocks; bfloat16.
        code: how a block is coded.
        layout: how the array is cut into blocks.
        dtype: of the array.
    """

    codes: Any
    scales: Any
    code: BlockCode
    layout: BlockLayout
    dtype: Any

    def __post_init__(self) -> None:
        tell_flax(LowBitArray, ("codes", "scales"), ("code", "layout", "dtype"))

    def decode(self) -> jax.Array:
        """The array, as near as the codes have it; shape and dtype of the array."""
        bits, shape = self.code.bits, list(self.codes.shape)
        if bits == 4:
            shape[self.layout.paired] *= 2
        layout = self.layout.of_shard(tuple(shape))
        cut = layout.cut(bits)
        codes = self.codes
        if cut.pair is None:
            codes = cut.spread(codes)
        else:
            half = lax.broadcasted_iota(jnp.uint8, cut.shape, cut.pair)
            codes = nibble(cut.spread(codes, ones=(cut.pair,)), half)
        scales = cut.spread(self.scales.astype(jnp.float32), ones=cut.own)
        grid = cut.gather(self.code.decode(codes, scales, xp=jnp), layout.grid)
        if not layout.folded:
            grid = grid[: math.prod(layout.shape)].reshape(layout.shape)
        return grid.astype(self.dtype)

    def encode(
        self, x: jax.Array, key: jax.Array | None, layer: jax.Array | int = 0
    ) -> "LowBitArray":
        """Another array of the same shape, in the same code and layout.

        Args:
            x: the array; any floating dtype.
            key: from `stream_key`, for stochastic rounding; `None` for the nearest level.
            layer: the index of the array in a stack, as of `Place`.
        """
        code, layout = self.code, self.layout.of_shard(x.shape)
        cut = layout.cut(code.bits)
        x = x.astype(jnp.float32)
        if not layout.folded:
            x = jnp.pad(x.reshape(-1), (0, layout.grid[0] - x.size))
        x = cut.spread(x)
        scales = code.scale(cut.largest(x), xp=jnp)
        # Numbered along the axes of the array: along those of the cut, XLA on a CPU takes twice as
        # long to code it.
        noise = code.half
        if key is not None:
            numbers = element_numbers(layout.grid, layer)
            noise = code.noise(random_bits(key, cut.spread(numbers)))
        codes = code.encode(x, scales, noise, xp=jnp)
        if cut.pair is not None:
            # A reduction over each pair: slices of the two halves keep XLA on a CPU from
            # vectorising whatever the codes are computed from.
            half = lax.broadcasted_iota(jnp.uint8, cut.shape, cut.pair)
            codes = jnp.expand_dims(lax.reduce_or(lifted(codes, half), (cut.pair,)), cut.pair)
        return dataclasses.replace(
            self,
            codes=cut.gather(codes, layout.code_shape(code.bits)),
            scales=cut.gather(scales, layout.scale_shape).astype(jnp.bfloat16),
        )


def as_built(state: Any, init: Callable[[Any], Any], like: Any) -> Any:
    """The state as `init` builds it, from one whose coded arrays came apart into mappings.

    nnx keeps what belongs to each tensor in a box, and gives back its fields by name; how they are
    coded is then only known from `init`.

    Args:
        state: as it came.
        init: what made it.
        like: parameters, or gradients of their shapes and dtypes.
    """
    if not nodes_with_paths(state, came_apart):
        return state
    template = jax.eval_shape(init, like)
    return jax.tree_util.tree_map_with_path(lambda path, _: at(state, path), template)


def came_apart(node: Any) -> bool:
    """Whether this node of a state is what nnx made of a coded array."""
    if not (isinstance(node, Mapping) and set(node) == {"codes", "scales"}):
        return False
    dtype = getattr(node["codes"], "dtype", jnp.float32)  # else parameters of these names
    return not jnp.issubdtype(dtype, jnp.floating)


def is_low_bit(node: Any) -> bool:
    """Whether this node of a state is a coded array."""
    return isinstance(node, LowBitArray)


def where(ok: jax.Array, new: LowBitArray, old: LowBitArray) -> LowBitArray:
    """`new` where `ok`, else `old` bit for bit: coding again what was decoded is not exact."""
    return jax.tree.map(lambda x, y: jnp.where(ok, x, y), new, old)
