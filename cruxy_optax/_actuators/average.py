"""Averaging the iterates: what replaces a schedule at the end of a run that has no end."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cruxy_control.checks import check_range
from cruxy_control.controls import Controls
from cruxy_control.formulas.averaging import averaging_weight
from cruxy_optax._tree import accumulator_dtype, find


class AverageIteratesState(NamedTuple):
    """The average of the parameters over the run."""

    average: optax.Params  # like the parameters; float32 (float64 for float64)
    count: jax.Array  # iterates in it; shape=(), dtype=int32

    held_by_controls = True


def average_iterates(power: float = 16.0) -> optax.GradientTransformationExtraArgs:
    r"""Averages the parameters on their way, late ones more; changes no update.

    $$
    \bar\theta_t = \bar\theta_{t-1} + c_t (\theta_t - \bar\theta_{t-1}), \qquad
    c_t = (p + 1) / (t + p)
    $$

    Put it last in a chain, where updates are what will be added to the parameters, and evaluate at
    `averaged_params(opt_state, params)`. A constant rate ends where noise holds it; the average
    ends below, as after a schedule, at every step and without knowing the last one. The average is
    kept in float32 at least, one more buffer beside the moments.

    Args:
        power: the `p` above, at least 0: 0 is the plain mean; about the last `1 / (p + 1)` of the
            run counts.

    Returns:
        An `optax.GradientTransformationExtraArgs`. Inside `stabilize` a skipped step leaves the
        average alone.

    Raises:
        ValueError: where `power` is negative; from `update` without `params`.

    Example:
        >>> import jax.numpy as jnp, optax, cruxy_optax
        >>> tx = optax.chain(optax.sgd(1.0), cruxy_optax.average_iterates(power=0.0))
        >>> params = jnp.zeros(2)
        >>> opt_state = tx.init(params)
        >>> for grads in (jnp.array([-1.0, -2.0]), jnp.array([-2.0, 0.0])):
        ...     updates, opt_state = tx.update(grads, opt_state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(params)
        [3. 2.]
        >>> print(cruxy_optax.averaged_params(opt_state, params))
        [2. 2.]

    References:
        Shamir and Zhang, [Stochastic Gradient Descent for Non-smooth
        Optimization](https://arxiv.org/abs/1212.1824), 2013.
    """
    power = check_range("power", power, 0.0, remedy="use 16, or 0 for the plain mean")

    def init_fn(params: optax.Params) -> AverageIteratesState:
        average = jax.tree.map(lambda p: jnp.array(p, accumulator_dtype(p), copy=True), params)
        return AverageIteratesState(average, jnp.zeros((), jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        controls: Controls | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AverageIteratesState]:
        del extra_args
        if params is None:
            raise ValueError(
                "average_iterates() averages the parameters, but got params=None; call "
                "update(grads, state, params)."
            )
        ok = jnp.array(True) if controls is None else controls.ok
        weight = jnp.where(ok, averaging_weight(state.count, power, xp=jnp), 0.0)

        def moved(mean: jax.Array, p: jax.Array, u: jax.Array) -> jax.Array:
            new = jnp.asarray(p).astype(mean.dtype) + jnp.where(ok, u, 0.0).astype(mean.dtype)
            return mean + weight * (new - mean)

        average = jax.tree.map(moved, state.average, params, updates)
        count = jnp.where(ok, optax.safe_increment(state.count), state.count)
        return updates, AverageIteratesState(average, count)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def averaged_params(opt_state: Any, params: optax.Params) -> optax.Params:
    """The averaged parameters, to evaluate at and to keep; found through any nesting.

    Args:
        opt_state: any pytree with the state of `average_iterates` in it, as `self_driving` has:
            inside `optax.chain`, `masked`, `partition`, `MultiSteps`, `inject_hyperparams`, a Flax
            `TrainState` or `nnx.Optimizer.opt_state`.
        params: the parameters that are trained; a leaf of which no average is kept, such as one
            that is masked out, comes back as it is.

    Returns:
        A tree like `params`, each leaf in its dtype. Before the first step it is `params`.

    Raises:
        ValueError: where there is no average in it.

    Example:
        >>> import jax.numpy as jnp, cruxy_optax
        >>> tx, params = cruxy_optax.self_driving(), jnp.ones(3)
        >>> print(cruxy_optax.averaged_params(tx.init(params), params))
        [1. 1. 1.]
    """
    nodes = find(opt_state, AverageIteratesState)
    if not nodes:
        raise ValueError(
            f"averaged_params() needs a state with an average in it, got {type(opt_state).__name__}"
            " without one; pass the opt_state of self_driving() or of a chain with "
            "average_iterates()."
        )
    # By path: nnx keeps each leaf in a box of another kind, and what is masked out has no leaf.
    averages: dict[Any, Any] = {}
    for node in nodes:
        averages |= dict(jax.tree_util.tree_flatten_with_path(node.average)[0])
    return jax.tree_util.tree_map_with_path(
        lambda path, p: averages[path].astype(jnp.result_type(p)) if path in averages else p,
        params,
    )
