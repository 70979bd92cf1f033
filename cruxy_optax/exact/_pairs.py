"""Pairs of `cruxy_exact` as differentiable functions."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cruxy_optax.exact._frame import frame


@dataclasses.dataclass(frozen=True)
class Pair:
    """A forward and a backward pass, and what is fixed when they are compiled.

    Attributes:
        forward: `NAME_forward` of `cruxy_exact`.
        backward: `NAME_backward`.
        fixed: its last arguments.
        options: its options by name.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    fixed: tuple[Hashable, ...] = ()
    options: tuple[tuple[str, Hashable], ...] = ()


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """What of the kept is no array: an ellipsis in the place of an array."""

    parts: tuple[Any, ...]


def run(
    part: Any,
    name: str,
    arrays: Sequence[Any],
    rest: Sequence[Any] = (),
    fixed: Sequence[Hashable] = (),
    **options: Hashable,
) -> Any:
    """A pair of `part` on arrays.

    Args:
        part: the module of `cruxy_exact`.
        name: of the pair.
        arrays: those that get gradients; float32, or `None`.
        rest: other arrays, such as labels.
        fixed: further arguments, which are no arrays.
        options: options by name.

    Raises:
        TypeError: where an array is not float32.
    """
    pair = Pair(
        getattr(part, f"{name}_forward"),
        getattr(part, f"{name}_backward"),
        tuple(fixed),
        tuple(options.items()),
    )
    return apply(pair, tuple(map(as_float32, arrays)), tuple(map(as_array, rest)))


def as_float32(x: Any) -> Any:
    """An array of what has float32 already; `None` stays.

    Raises:
        TypeError: where it is another type.
    """
    x = as_array(x)
    if x is not None and x.dtype != jnp.float32:
        raise TypeError(
            f"exact functions take float32 arrays, got {x.dtype}; keep parameters and inputs in "
            "float32."
        )
    return x


def as_array(x: Any) -> Any:
    """An array; `None` stays."""
    return None if x is None else jnp.asarray(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply(pair: Pair, arrays: tuple[Any, ...], rest: tuple[Any, ...]) -> Any:
    """The forward pass, with the backward pass as its derivative."""
    with frame():
        return _forward(pair, arrays, rest)[0]


def _apply_and_keep(
    pair: Pair, arrays: tuple[Any, ...], rest: tuple[Any, ...]
) -> tuple[Any, tuple[Any, ...]]:
    given = _Static(tuple(x is not None for x in arrays))
    with frame():
        y, *kept = _forward(pair, arrays, rest)
    return y, (*kept, given)


def _apply_backward(pair: Pair, kept: tuple[Any, ...], g: Any) -> tuple[Any, Any]:
    arrays, static, given = kept
    with frame():
        grads = iter(_once(pair, arrays, static, g))
    return tuple(next(grads) if there else None for there in given.parts), None


apply.defvjp(_apply_and_keep, _apply_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _once(pair: Pair, arrays: tuple[Any, ...], static: _Static, g: Any) -> tuple[Any, ...]:
    """The backward pass, whose own derivative would not be that of the function's gradient."""
    return _backward(pair, arrays, static, g)


def _twice(*_: Any) -> Any:
    raise TypeError(
        "exact functions must not be differentiated twice, got a derivative of their gradient; "
        "take the second derivative of jax.nn's and jax.numpy's own functions."
    )


_once.defvjp(_twice, _twice)


# Compiled each for itself, so that calls outside of `jax.jit` are not a hundred small programs.
@functools.partial(jax.jit, static_argnums=0)
def _forward(pair: Pair, arrays: tuple[Any, ...], rest: tuple[Any, ...]) -> tuple[Any, ...]:
    y, kept = pair.forward(*arrays, *rest, *pair.fixed, xp=jnp, **dict(pair.options))
    static = _Static(tuple(... if hasattr(part, "dtype") else part for part in kept))
    return y, tuple(part for part in kept if hasattr(part, "dtype")), static


@functools.partial(jax.jit, static_argnums=0)
def _backward(pair: Pair, arrays: tuple[Any, ...], static: _Static, g: Any) -> tuple[Any, ...]:
    waiting = iter(arrays)
    parts = tuple(next(waiting) if part is ... else part for part in static.parts)
    return pair.backward(parts, g, xp=jnp)
