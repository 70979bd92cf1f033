"""What is done to whole trees of gradients and parameters: norm, clip, share, sum."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from cruxy_control.checks import check_count, check_range
from cruxy_exact import optimizers as core
from cruxy_exact.arithmetic import add, f32, mul, settle
from cruxy_optax.exact._frame import frame
from cruxy_optax.exact._pairs import as_float32


def apply_updates(params: optax.Params, updates: optax.Updates) -> Any:
    """`params + updates`, settled: what `optax.apply_updates` does but for numbers below `2^-125`.

    Args:
        params: float32 arrays.
        updates: from an optimizer of `exact`.

    Returns:
        The new parameters.

    Raises:
        TypeError: where an array is not float32.
    """
    with frame():
        return jax.tree.map(lambda p, u: add(as_float32(p), as_float32(u), xp=jnp), params, updates)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients so that their norm together is at most `max_norm`; exactly.

    Args:
        max_norm: the largest norm, above 0.

    Returns:
        An `optax.GradientTransformation` without state. Where anything is not finite all becomes
        NaN.

    Raises:
        ValueError: where `max_norm` is not above 0.
        TypeError: from `update` where an array is not float32.
    """
    limit = check_range("max_norm", max_norm, 0.0, lower_open=True, remedy="1 is a usual value")

    def clipped(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
        del params
        with frame():
            updates = settled(updates)
            factor = core.clip_factor(global_norm(updates), limit, xp=jnp)
            return jax.tree.map(lambda g: mul(g, factor, xp=jnp), updates)

    return optax.stateless(clipped)


def global_norm(updates: optax.Updates) -> jax.Array:
    """The Euclidean norm of all arrays together; squares neither over- nor underflow.

    Args:
        updates: float32 arrays.

    Returns:
        float32, `()`. NaN where anything is not finite; 0 where there is nothing.

    Raises:
        TypeError: where an array is not float32.
    """
    with frame():
        leaves = [g for g in jax.tree.leaves(settled(updates)) if g.size]
        return core.global_norm(leaves, xp=jnp) if leaves else jnp.zeros((), jnp.float32)


def scale_by_count(count: int) -> optax.GradientTransformation:
    """Makes the gradients of a sum those of a mean: times the float32 reciprocal of `count`.

    Args:
        count: the samples or tokens of the whole batch, at least 1.

    Returns:
        An `optax.GradientTransformation` without state.

    Raises:
        ValueError: where `count` is below 1.
        TypeError: from `update` where an array is not float32.
    """
    check_count("count", count, 1, remedy="1 leaves the sum")
    share = f32(1 / count)

    def scaled(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
        del params
        with frame():
            return jax.tree.map(lambda g: mul(g, share, xp=jnp), settled(updates))

    return optax.stateless(scaled)


def settled(tree: Any) -> Any:
    """A tree of float32 arrays, settled.

    Raises:
        TypeError: where an array is not float32.
    """
    return jax.tree.map(lambda x: settle(as_float32(x), xp=jnp), tree)
