"""`quantize_state`: the state of any optax transformation in 8 or 4 bits between steps."""

import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cruxy_control.checks import check_count
from cruxy_exact.codes import BlockCode
from cruxy_exact.random_bits import stream_key
from cruxy_optax._controls import any_step_taken
from cruxy_optax._low_bit import LANES, BlockLayout, LowBitArray, as_built, is_low_bit, where
from cruxy_optax._places import WHOLE, Place
from cruxy_optax._stabilize import StabilizeState
from cruxy_optax._tree import find, find_with_paths

SMALLEST = 4096
"""Elements below which a leaf stays as it is: there is nothing to save."""

_NON_NEGATIVE = frozenset(
    "nu nu_max v v_row v_col n sum_of_squares grad_sum_sq exp_avg_sq e_g e_x step_sizes".split()
)
"""What optax's states call their sums of squares, and Rprop its step sizes."""

_COPIES = frozenset("z x0 params params0 init_params init_particles compensation".split())
"""What they call copies of the parameters, and what is too exact to be coded."""

Select = Any | Callable[[optax.Params], Any] | None


class QuantizeState(NamedTuple):
    """The wrapped transformation's state in low bits, and the counter of its rounding."""

    count: jax.Array  # steps so far, wrapping; shape=(), dtype=int32
    inner_state: optax.OptState  # with `LowBitArray` for every coded leaf


def quantize_state(
    inner: optax.GradientTransformation,
    bits: int = 8,
    *,
    block_size: int = 256,
    select: Select = None,
    signed: Mapping[str, bool] | None = None,
    stochastic: bool = True,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the state of any optax transformation in 8 or 4 bits an element between steps.

    Each step decodes the state, updates it in full precision, and codes it again: blocks of 256
    elements share a bfloat16 scale (`cruxy_exact.codes.BlockCode`). That is 1.01 bytes an element
    for 8 bits and 0.51 for 4, where float32 has 4.

    Coded are the leaves of the state that have the path and shape of a parameter, a floating dtype
    and at least 4,096 elements. All else stays as it is: counters, factored moments, small leaves,
    and copies of the parameters (the fields `z`, `x0`, `params0` and the like).

    Sums of squares have a code without zero and without a sign. They are told by the name of their
    field: `nu`, `nu_max`, `v`, `v_row`, `v_col`, `n`, `sum_of_squares`, `grad_sum_sq`,
    `exp_avg_sq`, `e_g`, `e_x`, `step_sizes`. Anything else is signed.

    Rounding is stochastic, so that what is smaller than a step of the code still counts on average:
    the nearest level of a slow average is for ever the level it has. It is reproducible: random
    bits are a function of the counter in the state, the seed, the leaf and the element.

    A step that a `stabilize` around it or inside it skips leaves every code as it was. NaN and
    infinity stay visible: their whole block decodes to them.

    Args:
        inner: any gradient transformation.
        bits: 8 or 4.
        block_size: elements that share a scale; a power of two, at least 32. Fewer cost more scales
            and lose less to an outlier.
        select: tree of booleans like (or a prefix of) the parameters, or a function that makes one,
            `True` where the state of a parameter may be coded; `None` for all. Embeddings and
            output layers are what is most often left in full precision.
        signed: by field name, whether its values have a sign, where the name above says otherwise
            or nothing: `{"v": True}`. Naming a copy of the parameters here has it coded.
        stochastic: whether rounding is; `False` for the nearest level, which saves a few percent of
            the time of a step and stops slow averages.
        seed: of the random bits; any whole number.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `QuantizeState`.

    Raises:
        ValueError: where `bits` or `block_size` is not one of those, or a `quantize_state` stands
            inside another.
        TypeError: where `inner` is no gradient transformation.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from cruxy_optax import quantize_state
        >>> params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
        >>> tx = quantize_state(optax.adam(1e-3), bits=8)
        >>> state = tx.init(params)
        >>> adam = state.inner_state[0]
        >>> print(adam.mu["w"].codes.dtype, adam.nu["w"].codes.dtype, adam.mu["b"].dtype)
        int8 uint8 float32
        >>> updates, state = tx.update(params, state, params)
        >>> print(updates["w"].mean().round(6))
        -0.001

    References:
        Dettmers et al., [8-bit Optimizers via Block-wise
        Quantization](https://arxiv.org/abs/2110.02861), 2021; Li et al., [Memory Efficient
        Optimizers with 4-bit States](https://arxiv.org/abs/2309.01507), 2023.
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"inner must be a gradient transformation, got {inner!r}; give optax.adam(1e-3) or the "
            "like."
        )
    codes = {sign: BlockCode(bits, sign) for sign in (True, False)}
    block_size = check_count("block_size", block_size, LANES, remedy="256 is a usual value")
    if block_size & (block_size - 1):
        raise ValueError(
            f"block_size must be a power of two, got {block_size!r}; 256 is a usual value."
        )
    inner = optax.with_extra_args_support(inner)
    is_signed: dict[str | None, bool] = dict.fromkeys(_NON_NEGATIVE, False)
    is_signed.update(signed or {})
    left_alone = _COPIES - is_signed.keys()

    def init_fn(params: optax.Params) -> QuantizeState:
        state, parameters = inner.init(params), _parameters(params, select)
        _refuse_nesting(state)
        differences = _signed_after_all(state)

        def start(path: tuple[Any, ...], leaf: Any) -> Any:
            owner = next((n for n in range(len(path) + 1) if path[n:] in parameters), None)
            if owner is None or not _is_worth_it(leaf, parameters[path[owner:]]):
                return leaf
            name = _field(path[:owner])
            if name in left_alone:
                return leaf
            code = codes[is_signed.get(name, True) or path[:owner] in differences]
            layout = BlockLayout.of(leaf.shape, block_size)
            return _start(LowBitArray(None, None, code, layout, leaf.dtype), leaf)

        state = jax.tree_util.tree_map_with_path(start, state)
        return QuantizeState(jnp.zeros((), jnp.int32), state)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, QuantizeState]:
        place: Place = extra_args.get("place", WHOLE)
        state = as_built(state, init_fn, updates if params is None else params)
        before = state.inner_state
        dense = jax.tree.map(
            lambda x: x.decode() if is_low_bit(x) else x, before, is_leaf=is_low_bit
        )
        updates, after = inner.update(updates, dense, params, **extra_args)

        coded = find(before, LowBitArray)
        keys = iter([None] * len(coded))
        if stochastic:
            keys = iter(_keys(state.count, seed, place.leaf, len(coded)))

        def encode(old: LowBitArray, new: jax.Array) -> LowBitArray:
            return old.encode(new, next(keys), place.layer)

        def visit(old: Any, new: Any) -> Any:
            if not isinstance(old, StabilizeState):
                return encode(old, new) if is_low_bit(old) else new
            ok = new.controls.ok
            return jax.tree.map(
                lambda x, y: where(ok, encode(x, y), x) if is_low_bit(x) else y,
                old,
                new,
                is_leaf=is_low_bit,
            )

        count = state.count + jnp.asarray(any_step_taken(after), jnp.int32)
        after = jax.tree.map(
            visit, before, after, is_leaf=lambda n: isinstance(n, LowBitArray | StabilizeState)
        )
        return updates, QuantizeState(count, after)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def in_bits(
    state_bits: int | None,
    mu_dtype: Any | None,
    moments: Callable[[Any | None], optax.GradientTransformation],
    name: str = "state_bits",
    seed: int = 0,
) -> optax.GradientTransformation:
    """The moments, of a dtype or in codes; `name` is what the user calls `state_bits`.

    Raises:
        ValueError: where it is none of 32, 16, 8 and 4, or both are given.
    """
    if state_bits is None:
        return moments(mu_dtype)
    if mu_dtype is not None:
        raise ValueError(
            "state_bits and mu_dtype both say how the first moment is kept, got "
            f"{state_bits!r} and {mu_dtype!r}; give one of them."
        )
    state_bits = check_bits(name, state_bits)
    if state_bits == 16:
        return moments(jnp.bfloat16)
    wide = moments(jnp.float32)
    if state_bits == 32:
        return wide
    coded = quantize_state(wide, state_bits, seed=seed)

    def init_fn(params: optax.Params) -> optax.OptState:
        state = coded.init(params)
        if not find(state, LowBitArray):
            warnings.warn(
                f"{name}={state_bits} codes nothing here: moments of fewer than {SMALLEST:,} "
                "elements stay in float32, and no parameter has as many; leave it out.",
                stacklevel=2,
            )
        return state

    # AXIOM has codes by default, and small models too.
    return coded if name != "state_bits" else coded._replace(init=init_fn)


def check_bits(name: str, bits: Any, among: Sequence[int] = (32, 16, 8, 4)) -> int:
    """A number of bits an element, as a plain int.

    Raises:
        ValueError: where it is none of those.
    """
    if not isinstance(bits, numbers.Integral) or bits not in among:
        *first, last = among
        raise ValueError(
            f"{name} must be {', '.join(map(str, first))} or {last}, got {bits!r}; use one of "
            "them, and name it in static_args under optax.inject_hyperparams."
        )
    return int(bits)


def _parameters(params: optax.Params, select: Select) -> dict[tuple[Any, ...], tuple[int, ...]]:
    """The shapes of the chosen parameters by path."""
    mask = True if select is None else select(params) if callable(select) else select
    whole = jax.tree.map(lambda m, part: jax.tree.map(lambda _: bool(m), part), mask, params)
    chosen = jax.tree.leaves(whole)
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {path: jnp.shape(p) for (path, p), yes in zip(flat, chosen, strict=True) if yes}


def _is_worth_it(leaf: Any, shape: tuple[int, ...]) -> bool:
    return (
        jnp.shape(leaf) == shape
        and jnp.size(leaf) >= SMALLEST
        and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    )


def _field(path: tuple[Any, ...]) -> str | None:
    """The last name in a path."""
    names = (getattr(key, "name", getattr(key, "key", None)) for key in reversed(path))
    return next((name for name in names if isinstance(name, str)), None)


def _signed_after_all(state: optax.OptState) -> set[tuple[Any, ...]]:
    """The paths to the `v` of Adan, an average of differences unlike everyone else's."""
    adans = find_with_paths(state, optax.ScaleByAdanState)
    return {(*path, jax.tree_util.GetAttrKey("v")) for path, _ in adans}


@jax.jit
def _start(blank: LowBitArray, x: jax.Array) -> LowBitArray:
    """The first codes, compiled so that a large leaf needs no copies on the way.

    XLA takes seconds to work out at compile time what a large leaf of zeros codes to.
    """
    return blank.encode(lax.optimization_barrier(x), None)


def _refuse_nesting(state: optax.OptState) -> None:
    if find(state, LowBitArray):
        raise ValueError(
            "quantize_state() must not stand around another one (state_bits=8 or 4 is one too), "
            "but inner has one: its codes cannot be coded again; put the two side by side, with "
            "optax.chain or optax.partition, or leave one out."
        )


def _keys(count: jax.Array, seed: int, first: int, number: int) -> list[jax.Array]:
    """The key of each coded leaf, worked out once rather than in every loop that uses it.

    A part that comes after the `first` leaves of its model has keys apart from theirs.
    """
    if not number:
        return []
    leaves = jnp.arange(number, dtype=jnp.int32) + (first << 16)
    return list(lax.optimization_barrier(stream_key(jnp.asarray(count), seed, leaves, xp=jnp)))
