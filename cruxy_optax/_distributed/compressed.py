"""Means of gradients over a mesh axis whose wire carries 8 or 4 bits an element."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cruxy_exact.codes import BlockCode, pack, unpack
from cruxy_exact.random_bits import random_bits, stream_key
from cruxy_optax._distributed.axes import gathered, split_axes
from cruxy_optax._places import element_numbers

BLOCK = 256
"""Elements that share a scale."""

OF_THE_MEAN = -1
"""The stream of random bits of the second phase; those of the first are numbered by device."""


def tracked(axis_name: str) -> bool:
    """Whether types say along this axis what differs by device: under `check_vma=True`."""
    return axis_name in split_axes(lax.axis_index(axis_name))


def exchanged(messages: jax.Array, axis_name: str) -> jax.Array:
    """From each device the row that is meant for this one."""
    return lax.all_to_all(messages, axis_name, 0, 0, tiled=True)


def compressed_pmean(
    tree: Any, axis_name: str, bits: int = 8, *, step: jax.typing.ArrayLike, seed: int = 0
) -> Any:
    """The mean over a mesh axis, as `jax.lax.pmean`, sent in 8 or 4 bits an element.

    A device codes its tree in as many parts as there are devices, sends each its part, adds up what
    it receives in float32, and sends the mean of its part, coded again, to all: an `all-to-all`
    and an `all-gather` of bytes in the place of an `all-reduce` of float32. All devices decode the
    same bytes and so have the same mean, to the bit. Codes are unbiased (`cruxy_exact.BlockCode`,
    a bfloat16 scale for 256 elements, blocks of each leaf for themselves), so that an error has
    nothing to be fed back. What is not finite on one device makes its block NaN on all.

    Args:
        tree: of real floating arrays of at most 32 bits an element, another on each device.
        axis_name: of an enclosing `jax.shard_map` (or `jax.pmap`, or `jax.vmap`).
        bits: 8 sends 1.008 bytes an element and phase, 4 sends 0.508.
        step: from which random bits follow, int32, `()`; another in every step.
        seed: of the random bits, any whole number.

    Returns:
        The tree of means, in its dtypes. `check_vma=True` knows that they do not differ by device.

    Raises:
        ValueError: where `bits` is neither, a leaf has another dtype, or is known to be the same on
            all devices: what `jax.grad` gives of parameters that do not differ has been added up.

    Examples:
        ```python
        grads = cruxy_optax.compressed_pmean(grads, "data", bits=8, step=step)
        ```

    References:
        Alistarh et al., [QSGD](https://arxiv.org/abs/1610.02132), 2017; Wang et al., [ZeRO++:
        Extremely Efficient Collective Communication for Giant Model
        Training](https://arxiv.org/abs/2306.10209), 2023.
    """
    wire = Wire(BlockCode(bits, signed=True), jnp.asarray(step, jnp.int32), seed)
    _check(jax.tree.leaves(tree), axis_name)
    ranks = int(lax.psum(1, axis_name))
    if ranks == 1 or not jax.tree.leaves(tree):
        return jax.tree.map(lambda leaf: lax.pmean(leaf, axis_name), tree)
    rows = cut(tree, ranks)
    rank = lax.axis_index(axis_name)
    total = wire.decode(exchanged(wire.encode(rows, 0, rank), axis_name)).sum(0)
    message = wire.encode((total / ranks)[None], rank * rows.shape[1], OF_THE_MEAN)
    return join(wire.decode(gathered(message[0], axis_name)), tree)


class AverageGradientsState(NamedTuple):
    """The counter from which random bits follow."""

    count: jax.Array  # steps so far, wrapping; shape=(), dtype=int32


def average_gradients(
    axis_name: str, bits: int | None = 8, *, seed: int = 0
) -> optax.GradientTransformation:
    """The mean of gradients over a mesh axis, sent in 8 or 4 bits: the first part of a chain.

    It stands before `stabilize` and what contains it, which is to see the mean: `optax.chain(
    average_gradients("data"), meta3(1e-3, axis_names="data"))`. The axis is given there too, for
    the loss. See `compressed_pmean`; worth it where the wire is what a step waits for.

    Args:
        axis_name: of an enclosing `jax.shard_map` (or `jax.pmap`, or `jax.vmap`).
        bits: 8 or 4; `python -m benchmarks wires` measures what each costs in loss. `None` sends
            the gradients as they are.
        seed: of the random bits, any whole number.

    Returns:
        An `optax.GradientTransformation`, whose state is one counter.

    Raises:
        ValueError: where `bits` is neither; from `update` as of `compressed_pmean`.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, cruxy_optax
        >>> from jax.sharding import PartitionSpec as P
        >>> tx = optax.chain(cruxy_optax.average_gradients("data"), optax.sgd(1.0))
        >>> def step(params, state, x):
        ...     own = jax.lax.pcast(params, "data", to="varying")  # gradients of each device
        ...     grads = jax.grad(lambda p: jnp.mean(jnp.sum((x - p) ** 2, 1)) / 2)(own)
        ...     updates, state = tx.update(grads, state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> mesh, specs = jax.sharding.Mesh(jax.devices(), ("data",)), (P(), P(), P("data"))
        >>> step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(P(), P()))
        >>> params, _ = jax.jit(step)(jnp.zeros(3), tx.init(jnp.zeros(3)), jnp.ones((8, 3)))
        >>> print(params.round(2))
        [1. 1. 1.]
    """
    if bits is not None:
        BlockCode(bits, signed=True)

    def init_fn(params: optax.Params) -> AverageGradientsState:
        del params
        return AverageGradientsState(jnp.zeros((), jnp.int32))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AverageGradientsState]:
        del params
        if bits is None:
            _check(jax.tree.leaves(updates), axis_name, narrow=False)
            updates = jax.tree.map(lambda leaf: lax.pmean(leaf, axis_name), updates)
        else:
            updates = compressed_pmean(updates, axis_name, bits, step=state.count, seed=seed)
        return updates, AverageGradientsState(state.count + 1)

    return optax.GradientTransformation(init_fn, update_fn)


class WireBytes(NamedTuple):
    """What a device hands to others in one mean.

    Attributes:
        sent: bytes of the two phases of `compressed_pmean`.
        uncompressed: bytes of a ring all-reduce of the same leaves in their own dtypes.
    """

    sent: int
    uncompressed: int


def wire_bytes(tree: Any, devices: int, bits: int = 8) -> WireBytes:
    """The bytes that each device hands to others in one `compressed_pmean`.

    Args:
        tree: of arrays or of `jax.ShapeDtypeStruct`.
        devices: along the axis, at least 1.
        bits: 8 or 4.

    Examples:
        >>> import jax.numpy as jnp
        >>> from cruxy_optax import wire_bytes
        >>> sent = wire_bytes(jnp.zeros((1024, 1024)), devices=8, bits=8)
        >>> print(f"{sent.uncompressed / sent.sent:.2f}")
        3.97
    """
    leaves = jax.tree.leaves(tree)
    each = -(-sum(_blocks_of(math.prod(leaf.shape)) for leaf in leaves) // devices)
    message = each * (BLOCK * BlockCode(bits, signed=True).bits // 8 + 2)
    plain = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    sent = 0 if devices == 1 else 2 * (devices - 1) * message
    return WireBytes(sent, 2 * (devices - 1) * plain // devices)


class Wire(NamedTuple):
    """A code, and where random bits come from."""

    code: BlockCode
    step: jax.Array
    seed: int

    def encode(self, blocks: jax.Array, first: Any, stream: Any) -> jax.Array:
        """A message of each row of blocks: their codes, then their scales, as bytes.

        Args:
            blocks: float32, `(rows, blocks, 256)`.
            first: the number of the first block.
            stream: another for messages with other random bits.
        """
        code = self.code
        # As integers, whose maximum passes NaN on: see `Cut.largest`.
        word = lax.bitcast_convert_type(blocks, jnp.int32) & 0x7FFFFFFF
        largest = lax.bitcast_convert_type(jnp.max(word, -1), jnp.float32)
        scales = code.scale(largest, xp=jnp)
        index = element_numbers(blocks.shape) + first * BLOCK
        key = stream_key(self.step, self.seed, stream, xp=jnp)
        codes = code.encode(blocks, scales[..., None], code.noise(random_bits(key, index)), xp=jnp)
        if code.bits == 4:
            codes = pack(*jnp.split(codes, 2, axis=-1))
        scales = lax.bitcast_convert_type(scales.astype(jnp.bfloat16), jnp.uint8)
        parts = (lax.bitcast_convert_type(codes, jnp.uint8), scales)
        return jnp.concatenate([part.reshape(len(blocks), -1) for part in parts], axis=1)

    def decode(self, messages: jax.Array) -> jax.Array:
        """The blocks of each message; float32, `(rows, blocks, 256)`."""
        code, width = self.code, BLOCK * self.code.bits // 8
        count = messages.shape[1] // (width + 2)
        codes = messages[:, : count * width].reshape(-1, count, width)
        scales = messages[:, count * width :].reshape(-1, count, 2)
        scales = lax.bitcast_convert_type(scales, jnp.bfloat16).astype(jnp.float32)
        if code.bits == 4:
            codes = jnp.concatenate(unpack(codes), axis=-1)
        else:
            codes = lax.bitcast_convert_type(codes, jnp.int8)
        return code.decode(codes, scales[..., None], xp=jnp)


def _blocks_of(size: int) -> int:
    return -(-size // BLOCK)


def cut(tree: Any, ranks: int) -> jax.Array:
    """A tree in blocks, each leaf's for itself, a row for each device.

    Returns:
        float32, `(ranks, blocks, 256)`, filled with zeros.
    """

    def blocks(leaf: jax.Array) -> jax.Array:
        flat = leaf.reshape(-1).astype(jnp.float32)
        return jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)

    rows = jnp.concatenate([blocks(leaf) for leaf in jax.tree.leaves(tree)])
    rows = jnp.pad(rows, ((0, -len(rows) % ranks), (0, 0)))
    return rows.reshape(ranks, -1, BLOCK)


def join(rows: jax.Array, like: Any) -> Any:
    """The tree that was cut into these blocks, in the shapes and dtypes of `like`."""
    rows, leaves, end = rows.reshape(-1, BLOCK), [], 0
    for leaf in jax.tree.leaves(like):
        begin, end = end, end + _blocks_of(leaf.size)
        own = rows[begin:end].reshape(-1)[: leaf.size]
        leaves.append(own.reshape(leaf.shape).astype(leaf.dtype))
    return jax.tree.structure(like).unflatten(leaves)


def _check(leaves: list[Any], axis_name: str, *, narrow: bool = True) -> None:
    own = tracked(axis_name)
    for leaf in leaves:
        dtype = jnp.result_type(leaf)
        if narrow and not (jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize in (2, 4)):
            raise ValueError(
                f"compressed gradients must be real and of 16 or 32 bits an element, got {dtype}; "
                "cast them, or use jax.lax.pmean."
            )
        if own and axis_name not in split_axes(leaf):
            raise ValueError(
                f"gradients must be each device's own along {axis_name!r}, got one that is the "
                "same on all: jax.grad has added it up already, as float32; take the gradient of "
                f"jax.lax.pcast(params, {axis_name!r}, to='varying'), before jax 0.9 of "
                f"jax.lax.pvary(params, {axis_name!r})."
            )
