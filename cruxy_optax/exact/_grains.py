"""Gradients added over micro-batches and devices so that no cut and no order can matter."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cruxy_control.checks import check_count
from cruxy_exact import accumulate as core
from cruxy_exact.accumulate import Grains
from cruxy_exact.arithmetic import f32, mul
from cruxy_optax.exact._frame import frame
from cruxy_optax.exact._gradients import settled


def no_grains(like: Any) -> Any:
    """The sum of no grains.

    Args:
        like: a tree of float32 arrays, such as the parameters.

    Returns:
        A tree of `Grains`, 16 bytes an element.
    """
    with frame():
        return jax.tree.map(lambda x: core.empty(jnp.asarray(x), xp=jnp), like)


def add_grain(grains: Any, gradients: Any) -> Any:
    """The sum with one more grain.

    A grain is a fixed number of samples, the least that a batch may be cut into. Its loss is a sum
    over them, not a mean, so that its gradients depend on nothing else.

    Args:
        grains: a tree of `Grains`. At most `2^33` fit.
        gradients: of one grain; a tree of float32 arrays. They are settled.

    Returns:
        A tree of `Grains`.

    Raises:
        TypeError: where a gradient is not float32.

    Examples:
        >>> import jax.numpy as jnp
        >>> from cruxy_optax import exact
        >>> grains = exact.no_grains(jnp.zeros(1))
        >>> for g in (1e8, 1.0, -1e8):
        ...     grains = exact.add_grain(grains, jnp.array([g]))
        >>> print(exact.grain_sum(grains))
        [1.]
    """
    with frame():
        return _with(lambda part, g: core.push(part, g, xp=jnp), grains, settled(gradients))


def merge_grains(a: Any, b: Any) -> Any:
    """The sum of two sums: trees of `Grains` alike."""
    with frame():
        return _with(lambda x, y: core.merge([x, y], xp=jnp), a, b)


def all_reduce_grains(grains: Any, axis_names: Any) -> Any:
    """The sum over the devices of an axis, inside `jax.shard_map` or `jax.pmap`.

    Integers are added: no order of the devices can matter. It sends 16 bytes an element.

    Args:
        grains: this device's tree of `Grains`.
        axis_names: the axis, or a tuple of axes.

    Returns:
        A tree of `Grains`, the same on all devices.
    """

    def reduced(part: Grains) -> Grains:
        place = jax.lax.pmax(part.bin, axis_names)
        high, low, _ = core.raised(part, place, xp=jnp)
        return Grains(jax.lax.psum(high, axis_names), jax.lax.psum(low, axis_names), place)

    with frame():
        return _with(reduced, grains)


def grain_sum(grains: Any) -> Any:
    """The sum in float32, rounded once.

    Args:
        grains: a tree of `Grains`.

    Returns:
        A tree of float32 arrays, at most `n max|x| 2^-30 + 2^-24 |sum|` off for `n` grains. NaN in
        a whole array where any of its gradients was not finite.
    """
    with frame():
        return _with(lambda part: core.value(part, xp=jnp), grains)


def _with(function: Any, grains: Any, *others: Any) -> Any:
    return jax.tree.map(function, grains, *others, is_leaf=_is_grains)


def _is_grains(node: Any) -> bool:
    return isinstance(node, Grains)


class AccumulateGrainsState(NamedTuple):
    """What `accumulate_grains` keeps."""

    calls: jax.Array  # since the last step of the inner optimizer; shape=(), dtype=int32
    grains: Any  # their sum, a tree of Grains
    inner_state: optax.OptState


def accumulate_grains(
    inner: optax.GradientTransformation, every: int, count: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer on the exact sum of the gradients of `every` calls.

    What `optax.MultiSteps` does, but no cut of a batch into calls, grains and devices changes a
    bit.

    Args:
        inner: the optimizer.
        every: calls of `update` to one step of it, at least 1.
        count: what the sum is divided by, as the samples or tokens in the whole batch; it is
            multiplied with the float32 reciprocal. At least 1.

    Returns:
        An `optax.GradientTransformationExtraArgs`. `update` takes the gradients of one grain, or a
        tree of `Grains` that `add_grain` made of many. Updates are 0 but for every `every`-th call.
        State: that of `inner`, and 16 bytes a parameter.

    Raises:
        ValueError: where a number is below 1.
        TypeError: from `update` where a gradient is not float32.

    Examples:
        >>> import jax.numpy as jnp
        >>> from cruxy_optax import exact
        >>> tx = exact.accumulate_grains(exact.sgd(1.0), every=2, count=4)
        >>> params = jnp.ones(1)
        >>> state = tx.init(params)
        >>> for g in (1.0, 2.0):
        ...     updates, state = tx.update(jnp.array([g]), state, params)
        ...     print(updates)
        [0.]
        [-0.75]
    """
    every = check_count("every", every, 1, remedy="1 steps at every call")
    share = f32(1 / check_count("count", count, 1, remedy="1 leaves the sum"))
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> AccumulateGrainsState:
        zero = jnp.zeros((), jnp.int32)
        return AccumulateGrainsState(zero, no_grains(params), inner.init(params))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AccumulateGrainsState]:
        several = any(map(_is_grains, jax.tree.leaves(updates, is_leaf=_is_grains)))
        grains = (merge_grains if several else add_grain)(state.grains, updates)

        def step(grains: Any, inner_state: Any) -> Any:
            with frame():
                mean = _with(lambda x: mul(core.value(x, xp=jnp), share, xp=jnp), grains)
            out, inner_state = inner.update(mean, inner_state, params, **extra_args)
            return out, no_grains(mean), inner_state

        def wait(grains: Any, inner_state: Any) -> Any:
            out = _with(lambda x: jnp.zeros(x.high.shape, jnp.float32), grains)
            return out, grains, inner_state

        calls = state.calls + 1
        due = calls >= every
        out, grains, inner_state = jax.lax.cond(due, step, wait, grains, state.inner_state)
        return out, AccumulateGrainsState(jnp.where(due, 0, calls), grains, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
