"""What the backward pass needs of the forward pass, in 8 or 4 bits an element."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cruxy_control.checks import check_count
from cruxy_exact.affine import GROUP, AffineCode
from cruxy_exact.codes import pack, unpack
from cruxy_exact.random_bits import random_bits, stream_key
from cruxy_optax._places import element_numbers

SMALLEST = 4096
"""Elements below which an array stays as it is: there is nothing to save."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "offsets", "steps"],
    meta_fields=["code", "shape", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class CodedActivation:
    """An array kept as codes: a pytree of three arrays.

    Attributes:
        codes: uint8, a group to a row: `(groups, 256)`, for 4 bits `(groups, 128)`, the first half
            of a group in the lower bits.
        offsets: bfloat16, `(groups, 1)`.
        steps: likewise.
        code: what they mean.
        shape: of the array.
        dtype: of the array.
    """

    codes: jax.Array
    offsets: jax.Array
    steps: jax.Array
    code: AffineCode
    shape: tuple[int, ...]
    dtype: Any


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def encode(
    x: jax.Array, code: AffineCode, stream: tuple[int, int] | None, barrier: bool = True
) -> CodedActivation:
    """Codes an array.

    Random bits follow from the array itself: another one has others, and a run can be repeated
    without a counter in any state.

    Args:
        x: of any floating dtype and at least one element.
        code: how.
        stream: seed of the random bits and the number of this array among those that share it;
            `None` rounds to the nearest level.
        barrier: keeps XLA from keeping `x` beside the codes.
    """
    flat = x.reshape(-1).astype(jnp.float32)
    flat = jnp.pad(flat, (0, -flat.size % GROUP), mode="edge")  # which widens no group
    rows = flat.reshape(-1, GROUP)
    offset, step = code.offset_and_step(*_extremes(rows), xp=jnp)
    noise: Any = code.half
    if stream is not None:
        numbers = element_numbers(rows.shape)
        # A hash: a sum of the bits alone is the same for many arrays, as of equal numbers.
        content = random_bits(lax.bitcast_convert_type(rows, jnp.int32), numbers)
        key = stream_key(jnp.sum(content, dtype=jnp.int32), *stream, xp=jnp)
        noise = code.noise(random_bits(key, numbers))
    codes = code.encode(rows, offset, step, noise, xp=jnp)
    if code.bits == 4:
        codes = pack(*jnp.split(codes, 2, axis=1))
    kept = (codes, offset.astype(jnp.bfloat16), step.astype(jnp.bfloat16))
    if barrier:
        kept = lax.optimization_barrier(kept)
    codes, offset, step = kept
    return CodedActivation(codes, offset, step, code, x.shape, x.dtype)


@encode.defjvp
def _encode_jvp(*_: Any) -> Any:
    raise TypeError(
        "compressed activations must not be differentiated twice, got a derivative of a derivative "
        "of compressed_checkpoint(): codes have none; use jax.checkpoint there."
    )


def _extremes(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest number of each row, one of which is NaN where there is one.

    As integers, whose order is that of the numbers with NaN at both ends: a minimum of floating
    numbers drops NaN where XLA on a CPU vectorises it.
    """
    word = lax.bitcast_convert_type(rows, jnp.int32)
    ordered = word ^ ((word >> 31) & 0x7FFFFFFF)
    ends = (jnp.min(ordered, 1, keepdims=True), jnp.max(ordered, 1, keepdims=True))
    low, high = (lax.bitcast_convert_type(e ^ ((e >> 31) & 0x7FFFFFFF), jnp.float32) for e in ends)
    return low, high


def decode(coded: CodedActivation) -> jax.Array:
    """The array, as near as the codes have it; shape and dtype of the array."""
    codes, offset, step = coded.codes, coded.offsets, coded.steps
    if coded.code.bits == 4:
        codes = jnp.concatenate(unpack(codes), axis=1)
    wide = (offset.astype(jnp.float32), step.astype(jnp.float32))
    rows = coded.code.decode(codes, *wide, xp=jnp)
    flat = rows.reshape(-1)[: math.prod(coded.shape)]
    return flat.reshape(coded.shape).astype(coded.dtype)


def encode_tree(
    tree: Any,
    code: AffineCode,
    *,
    smallest: int = SMALLEST,
    stochastic: bool = True,
    seed: int = 0,
    first: int = 0,
) -> Any:
    """The tree with its floating leaves of at least so many elements as `CodedActivation`."""
    leaves, structure = jax.tree.flatten(tree)
    coded = [
        encode(leaf, code, (seed, number) if stochastic else None)
        if _is_worth_it(leaf, smallest)
        else leaf
        for number, leaf in enumerate(leaves, first)
    ]
    return structure.unflatten(coded)


def decode_tree(tree: Any) -> Any:
    """The tree that `encode_tree` was given, as near as the codes have it."""
    return jax.tree.map(lambda x: decode(x) if _is_coded(x) else x, tree, is_leaf=_is_coded)


def _is_coded(node: Any) -> bool:
    return isinstance(node, CodedActivation)


def _is_worth_it(leaf: Any, smallest: int) -> bool:
    dtype = jnp.result_type(leaf)
    narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize in (2, 4)
    return narrow and jnp.size(leaf) >= smallest


def compressed_checkpoint(
    f: Callable[..., Any],
    bits: int = 8,
    *,
    exact_argnums: int | Sequence[int] = 0,
    min_elements: int = SMALLEST,
    stochastic: bool = True,
    seed: int = 0,
) -> Callable[..., Any]:
    """`jax.checkpoint` that keeps a function's inputs in 8 or 4 bits an element.

    Of `f` nothing is kept for the backward pass but its arguments, as under `jax.checkpoint`; those
    that are activations are kept as codes: 1.016 bytes an element for 8 bits and 0.516 for 4, where
    float32 has 4. The backward pass computes `f` again from what the codes stand for. The forward
    pass is what it is without it. Codes are unbiased (`cruxy_exact.AffineCode`): the mean of what
    they decode to is the argument itself, and so is the mean of the gradients of what is linear in
    it. Random bits follow from the seed and from what is coded.

    A policy of `jax.checkpoint` cannot do this: it chooses what is kept, not in which form.

    Args:
        f: a function of positional arguments, trees of arrays. What it is differentiated by has to
            be an argument: what it closes over counts as constant, and JAX says so.
        bits: 8 or 4.
        exact_argnums: arguments that are kept as they are, by number: the parameters, which are
            there anyway. All others are activations, of which floating arrays of at least
            `min_elements` and at most 32 bits an element are coded.
        min_elements: what has fewer is kept as it is; at least 1.
        stochastic: rounds up or down by chance; `False` takes the nearest level, whose error is
            smaller and a bias.
        seed: of the random bits, any whole number.

    Returns:
        A function like `f`, for `jax.grad` and the like; under `lax.scan` over layers it keeps one
        coded input a layer. Forward-mode derivatives JAX refuses, as of every `jax.custom_vjp`.

    Raises:
        ValueError: where `bits` or `min_elements` is outside its range.
        TypeError: where it is differentiated twice.

    Examples:
        >>> import jax, jax.numpy as jnp, cruxy_optax
        >>> def layer(w, x): return x + jnp.tanh(x @ w)
        >>> layer = cruxy_optax.compressed_checkpoint(layer, bits=8)
        >>> def loss(ws, x):
        ...     return jnp.mean(jax.lax.scan(lambda x, w: (layer(w, x), None), x, ws)[0])
        >>> ws, x = jnp.full((4, 64, 64), 0.01), jnp.ones((256, 64))
        >>> print(jax.grad(loss)(ws, x).shape)
        (4, 64, 64)

    References:
        Chen et al., [ActNN](https://arxiv.org/abs/2104.14129), 2021; Chen et al., [Training Deep
        Nets with Sublinear Memory Cost](https://arxiv.org/abs/1604.06174), 2016.
    """
    code = AffineCode(bits)
    smallest = check_count("min_elements", min_elements, 1, remedy="4096 is a usual value")
    exact = {exact_argnums} if isinstance(exact_argnums, int) else set(exact_argnums)
    encoded = functools.partial(
        encode_tree, code=code, smallest=smallest, stochastic=stochastic, seed=seed
    )

    @jax.custom_vjp
    def checkpointed(*args: Any) -> Any:
        return f(*args)

    def forward(*args: Any) -> tuple[Any, Any]:
        kept, first = [], 0
        for number, argument in enumerate(args):
            kept.append(argument if number in exact else encoded(argument, first=first))
            first += len(jax.tree.leaves(argument))
        return f(*args), kept

    def backward(kept: Any, cotangents: Any) -> Any:
        # What XLA computes before the cotangents are there would be kept until they are.
        kept, cotangents = lax.optimization_barrier((kept, cotangents))
        args = decode_tree(kept)
        return jax.vjp(f, *args)[1](cotangents)

    checkpointed.defvjp(forward, backward)
    return functools.wraps(f)(lambda *args: checkpointed(*args))
