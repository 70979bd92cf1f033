"""Averaging the iterates: what replaces a schedule at the end of a run that has no end."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cruxy_control.checks import check_range
from cruxy_control.controls import Controls
from cruxy_control.formulas.averaging import averaging_weight
from cruxy_optax._release import LayerStack
from cruxy_optax._tree import accumulator_dtype, find, where


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

    Examples:
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
            new = jnp.asarray(p).astype(mean.dtype) + where(ok, u).astype(mean.dtype)
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
            `TrainState` or `nnx.Optimizer.opt_state`, or the state of `release_gradients`.
        params: the parameters that are trained, as `tx.init` had them; a leaf that is masked out of
            all averages comes back as it is.

    Returns:
        A tree like `params`, each leaf in its dtype. Before the first step it is `params`.

    Raises:
        ValueError: where there is no average in it, or where averages and parameters differ in
            paths or shapes, as those of `optax.flatten(self_driving())` do; the message names some.

    Examples:
        >>> import jax.numpy as jnp, cruxy_optax
        >>> tx, params = cruxy_optax.self_driving(), jnp.ones(3)
        >>> print(cruxy_optax.averaged_params(tx.init(params), params))
        [1. 1. 1.]
    """
    nodes = _averages_with_places(opt_state)
    if not nodes:
        raise ValueError(
            f"averaged_params() needs a state with an average in it, got {type(opt_state).__name__}"
            " without one; pass the opt_state of self_driving() or of a chain with "
            "average_iterates()."
        )
    # By path: nnx keeps each leaf in a box of another kind, and what is masked out has no leaf.
    averages: dict[Any, Any] = {}
    for place, node in nodes:
        flat, _ = jax.tree_util.tree_flatten_with_path(node.average, is_leaf=_is_masked)
        for path, average in flat:
            if not (_is_masked(average) and (*place, *path) in averages):
                averages[(*place, *path)] = average
    _check_match(averages, params)

    def averaged(path: tuple[Any, ...], p: Any) -> Any:
        average = averages.get(path)  # a mask may be a prefix of the tree
        masked = average is None or _is_masked(average)
        return p if masked else jnp.asarray(average).astype(jnp.result_type(p))

    return jax.tree_util.tree_map_with_path(averaged, params)


def _averages_with_places(opt_state: Any) -> list[tuple[tuple[Any, ...], AverageIteratesState]]:
    """Every average, with the path of its tree in the parameters.

    Those of released gradients are each of a part of the model.
    """
    places = []
    for stack in find(opt_state, (AverageIteratesState, LayerStack)):
        if isinstance(stack, LayerStack):
            for name, part in stack._asdict().items():
                at = (jax.tree_util.GetAttrKey(name),)
                places += [(at, node) for node in find(part, AverageIteratesState)]
        else:
            places.append(((), stack))
    return places


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _check_match(averages: dict[Any, Any], params: optax.Params) -> None:
    """Refuses parameters that are others than those of which there are averages."""
    masked = {path for path, average in averages.items() if _is_masked(average)}
    shapes = {p: jnp.shape(a) for p, a in averages.items() if p not in masked}
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    wanted = {path: jnp.shape(p) for path, p in flat}
    strangers = [
        path
        for path in wanted
        if path not in shapes and not any(path[:n] in masked for n in range(len(path) + 1))
    ]
    lost = [path for path in shapes if path not in wanted]
    reshaped = [path for path in shapes if path in wanted and shapes[path] != wanted[path]]
    for paths, what in (
        (lost, "averages of which there is no parameter"),
        (strangers, "parameters of which there is no average"),
        (reshaped, "parameters of another shape than their average"),
    ):
        if paths:
            # The path to a tree that is one array is empty.
            names = ", ".join(jax.tree_util.keystr(path) or "params itself" for path in paths[:3])
            raise ValueError(
                "params must have the paths and shapes of the averages in opt_state, got "
                f"{len(paths)} {what}, such as {names}; pass the parameters that tx.init had. "
                "Where the optimizer sees them in another form, as inside optax.flatten, put "
                "average_iterates() behind that, and give the optimizer averaging=None."
            )
