"""`NearArray`: an array kept by its lowest digits, to be read beside one that lies near."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cruxy_exact.near import NearCode
from cruxy_exact.random_bits import random_bits
from cruxy_optax._flax import tell_flax
from cruxy_optax._low_bit import BlockLayout, Cut
from cruxy_optax._places import element_numbers
from cruxy_optax._tree import accumulator_dtype

BLOCK_SIZE = 256
"""Elements that share a step."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales"],
    meta_fields=["code", "layout"],
)
@dataclasses.dataclass(frozen=True)
class NearArray:
    """An array kept by its lowest digits: a pytree of two arrays.

    Attributes:
        codes: of the array's shape, int8 or int16; of one axis where the array was flattened.
        scales: the step of each block, in the shape of the blocks; bfloat16.
        code: how a block is coded.
        layout: how the array is cut into blocks.
    """

    codes: Any
    scales: Any
    code: NearCode
    layout: BlockLayout

    def __post_init__(self) -> None:
        tell_flax(NearArray, ("codes", "scales"), ("code", "layout"))

    @classmethod
    def like(cls, x: jax.Array, bits: int) -> "NearArray":
        """An array that is `x`, to be read beside `x`, in 16 or 8 bits an element."""
        return _start(x, bits)

    @classmethod
    def of_parts(cls, parts: Mapping[str, Any], shape: tuple[int, ...]) -> "NearArray":
        """An array of this shape whose fields came apart into a mapping."""
        code = NearCode(8 * jnp.result_type(parts["codes"]).itemsize)
        layout = BlockLayout.of(shape, BLOCK_SIZE)
        return cls(jnp.asarray(parts["codes"]), jnp.asarray(parts["scales"]), code, layout)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array, or of a stack of such arrays."""
        stack = self.codes.ndim - len(self.layout.grid)
        return (*self.codes.shape[:stack], *self.layout.shape)

    def decode(self, near: Any) -> jax.Array:
        """The array, of the shape of `near`; float32 at least."""
        if self.codes.ndim > len(self.layout.grid):  # released gradients keep stacks
            return jax.vmap(NearArray.decode)(self, near)
        layout, near = self.layout.of_shard(jnp.shape(near)), jnp.asarray(near)
        cut, wide = layout.cut(8), near.astype(accumulator_dtype(near))
        grid = cut.spread(self.scales.astype(jnp.float32), ones=cut.own)
        whole = _spread(wide, layout, cut)
        offset = self.code.offset(cut.spread(self.codes), whole, grid, xp=jnp)
        offset = cut.gather(offset, layout.grid)
        if not layout.folded:
            offset = offset[: math.prod(layout.shape)].reshape(layout.shape)
        return wide + offset.astype(wide.dtype)

    def residues(self) -> jax.Array:
        """The array, but for multiples of `spans`; float32."""
        return self._each(lambda codes, grid: codes.astype(jnp.float32) * grid)

    def spans(self) -> jax.Array:
        """How far apart numbers with the code of each element are; float32, like the array."""
        return self._each(lambda codes, grid: jnp.full(codes.shape, self.code.span) * grid)

    def _each(self, of: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        """What follows from each code and the step of its block."""
        cut = self.layout.cut(8)
        grid = cut.spread(self.scales.astype(jnp.float32), ones=cut.own)
        values = cut.gather(of(cut.spread(self.codes), grid), self.layout.grid)
        return values.reshape(-1)[: math.prod(self.layout.shape)].reshape(self.layout.shape)

    def encode(self, x: Any, near: Any) -> "NearArray":
        """Another array of the same shape, to be read beside `near`, to the nearest step."""
        layout = self.layout.of_shard(jnp.shape(near))
        cut, near = layout.cut(8), jnp.asarray(near)
        wide = near.astype(accumulator_dtype(near))
        offset = _spread(jnp.asarray(x, wide.dtype) - wide, layout, cut)
        grid = cut.spread(self.scales.astype(jnp.float32), ones=cut.own)
        grid = self.code.grid(cut.largest(offset.astype(jnp.float32)), grid, xp=jnp)
        return self._with(offset, _spread(wide, layout, cut), grid, 0.5, layout, cut)

    def moved(
        self,
        old: jax.Array,
        new: jax.Array,
        weight: jax.Array,
        key: jax.Array,
        layer: jax.Array | int = 0,
    ) -> "NearArray":
        """The array after it went this share of the way to `new`, to be read beside that.

        Args:
            old: what it is to be read beside so far; float32 or float64.
            new: of the same shape and dtype.
            weight: the share; `()`.
            key: from `stream_key`.
            layer: the index of the array in a stack, as of `Place`.
        """
        layout = self.layout.of_shard(old.shape)
        cut = layout.cut(8)
        old, new = _spread(old, layout, cut), _spread(new, layout, cut)
        grid = cut.spread(self.scales.astype(jnp.float32), ones=cut.own)
        offset = self.code.offset(cut.spread(self.codes), old, grid, xp=jnp) - (new - old)
        grid = self.code.grid(cut.largest(offset.astype(jnp.float32)), grid, xp=jnp)
        numbers = cut.spread(element_numbers(layout.grid, layer))
        noise = self.code.noise(random_bits(key, numbers), xp=jnp)
        offset = offset - weight * offset
        return self._with(offset, new, grid, noise, layout, cut)

    def _with(
        self, offset: Any, near: Any, grid: Any, noise: Any, layout: BlockLayout, cut: Cut
    ) -> "NearArray":
        codes = self.code.encode(offset, near, grid, noise, xp=jnp)
        return dataclasses.replace(
            self,
            codes=cut.gather(codes, layout.grid),
            scales=cut.gather(grid, layout.scale_shape).astype(jnp.bfloat16),
        )


@functools.partial(jax.jit, static_argnums=1)
def _start(x: jax.Array, bits: int) -> NearArray:
    code, layout = NearCode(bits), BlockLayout.of(x.shape, BLOCK_SIZE)
    cut, wide = layout.cut(8), x.astype(accumulator_dtype(x))
    whole = _spread(wide, layout, cut)
    reach = code.first_reach(cut.largest(whole.astype(jnp.float32)), xp=jnp)
    grid = code.grid(reach, jnp.ones_like(reach), xp=jnp)
    blank = NearArray(None, None, code, layout)
    return blank._with(jnp.zeros_like(whole), whole, grid, 0.5, layout, cut)


def _spread(x: jax.Array, layout: BlockLayout, cut: Cut) -> jax.Array:
    if not layout.folded:
        x = jnp.pad(x.reshape(-1), (0, layout.grid[0] - x.size))
    return cut.spread(x)


def decoded_near(kept: Any, near: Any) -> jax.Array:
    """An array that may be a `NearArray`, which is read beside `near`."""
    return kept.decode(near) if isinstance(kept, NearArray) else jnp.asarray(kept)
