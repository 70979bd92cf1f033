"""Averaging the iterates: what replaces a schedule at the end of a run that has no end."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cruxy_control.checks import check_range
from cruxy_control.controls import Controls, falls
from cruxy_control.formulas.averaging import POWER, averaging_orders
from cruxy_exact.random_bits import stream_key
from cruxy_optax._low_bit import as_built, came_apart
from cruxy_optax._memory.quantize import SMALLEST, check_bits
from cruxy_optax._near_array import NearArray, decoded_near
from cruxy_optax._places import WHOLE, Place
from cruxy_optax._release import LayerStack
from cruxy_optax._tree import accumulator_dtype, find, where

BITS = (32, 16, 8)
"""Bits an element in which averages can be kept."""


class AverageIteratesState(NamedTuple):
    """The average of the parameters over the run."""

    average: optax.Params  # like the parameters; float32 (float64 for float64) or `NearArray`
    count: jax.Array  # iterates in it; shape=(), dtype=int32

    held_by_controls = True

    @property
    def iterate_average(self) -> optax.Params:
        """What a law compares the parameters with that moves its set point."""
        return self.average


def average_iterates(
    power: float = POWER, bits: int | None = None, interpolation: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the parameters on their way, late ones more; may pull them along.

    $$
    \bar\theta_t = \bar\theta_{t-1} + c_t (\theta_t - \bar\theta_{t-1}), \qquad
    c_t = (p + 1) / (t + p)
    $$

    Put it last in a chain, where updates are what will be added to the parameters, and evaluate at
    `averaged_params(opt_state, params)`. A constant rate ends where noise holds it; the average
    ends below, as after a schedule, at every step and without knowing the last one. The average is
    kept in float32 at least, one more buffer beside the moments, or in fewer bits: it lies near the
    parameters, so that its lowest digits tell it (`cruxy_exact.NearCode`).

    With an `interpolation` $\beta$ the parameters move by $\beta$ times what their average moves,
    on top of each update, and the average by $1 / (1 - \beta)$ times as much. That is
    schedule-free averaging without a third sequence: gradients are taken at
    $y = (1 - \beta) z + \beta \bar\theta$, which the parameters are, for a $z$ that takes
    $1 / (1 - \beta)$ times the updates. A share of every step is soon undone and a share of the
    average takes its place, so that larger steps are borne.

    Args:
        power: the `p` above, at least 0: 0 is the plain mean; about the last `1 / (p + 1)` of the
            run counts.
        bits: an element of the average, 32 (`None`), 16 or 8. In 16 and 8 bits a leaf of at least
            4,096 elements takes 2.01 and 1.01 bytes an element, and is rounded by chance where it
            moves; whoever changes parameters by more than a step does then changes their average
            with them. Under `optax.inject_hyperparams`, name it in `static_args`.
        interpolation: the $\beta$ above, in `[0, 1)`; 0 changes no update. With it a `power` of 2
            to 4 is usual. Bfloat16 parameters may round a small pull away, as any small update;
            `round_updates` around it keeps it.

    Returns:
        An `optax.GradientTransformationExtraArgs`. Inside `stabilize` a skipped step leaves the
        average alone.

    Raises:
        ValueError: where `power` or `interpolation` is outside its range or `bits` none of those;
            from `update` without `params`.

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
        Optimization](https://arxiv.org/abs/1212.1824), 2013; Defazio et al., [The Road Less
        Scheduled](https://arxiv.org/abs/2405.15682), 2024.
    """
    remedy = "use 0 for an average that pulls nothing"
    beta = check_range("interpolation", interpolation, 0.0, 1.0, upper_open=True, remedy=remedy)
    power = check_range("power", power, 0.0, remedy="use 16, or 0 for the plain mean")
    bits = 32 if bits is None else check_bits("bits", bits, BITS)

    def start(p: Any) -> Any:
        if bits < 32 and jnp.size(p) >= SMALLEST:
            return NearArray.like(jnp.asarray(p), bits)
        return jnp.array(p, accumulator_dtype(p), copy=True)

    def init_fn(params: optax.Params) -> AverageIteratesState:
        return AverageIteratesState(jax.tree.map(start, params), jnp.zeros((), jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        controls: Controls | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AverageIteratesState]:
        if params is None:
            raise ValueError(
                "average_iterates() averages the parameters, but got params=None; call "
                "update(grads, state, params)."
            )
        place: Place = extra_args.get("place", WHOLE)
        state = as_built(state, init_fn, params)
        ok = jnp.array(True) if controls is None else controls.ok
        falling = controls is not None and falls(controls)
        weight, share = averaging_orders(state.count, power, beta, falling, xp=jnp)
        weight = jnp.where(ok, weight, 0.0)

        def pulled(mean: Any, p: Any, u: jax.Array) -> jax.Array:
            old = jnp.asarray(p).astype(accumulator_dtype(p))
            way = old - decoded_near(mean, p) + u.astype(old.dtype)
            return where(ok, u + (share * way).astype(u.dtype), u)

        def moved(mean: Any, p: Any, u: jax.Array, number: int) -> Any:
            old = jnp.asarray(p).astype(accumulator_dtype(p))
            new = old + where(ok, u).astype(old.dtype)
            if not _is_coded(mean):
                return mean + weight * (new - mean)
            key = stream_key(state.count, 0, number, xp=jnp)
            coded = mean.moved(old, new, weight, key, place.layer)
            return jax.tree.map(lambda x, y: where(ok, x, y), coded, mean)

        means, treedef = jax.tree.flatten(state.average, is_leaf=_is_coded)
        olds, changes = treedef.flatten_up_to(params), treedef.flatten_up_to(updates)
        if share is not None:
            changes = list(map(pulled, means, olds, changes))
            updates = treedef.unflatten(changes)
        rows = zip(means, olds, changes, range(place.leaf, place.leaf + len(means)), strict=True)
        average = treedef.unflatten([moved(*row) for row in rows])
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
            all averages comes back as it is. Where averages are kept in fewer bits, those that the
            last update has led to: they are read beside them.

    Returns:
        A tree like `params`, each leaf in its dtype. Before the first step it is `params`, in fewer
        bits to half a step of the code.

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
    shapes = {path: jnp.shape(p) for path, p in jax.tree_util.tree_flatten_with_path(params)[0]}
    averages: dict[Any, Any] = {}
    for place, node in nodes:
        flat, _ = jax.tree_util.tree_flatten_with_path(node.average, is_leaf=_is_one)
        for path, average in flat:
            at = (*place, *path)
            if came_apart(average):
                average = NearArray.of_parts(average, shapes.get(at, ()))
            if not (_is_masked(average) and at in averages):
                averages[at] = average
    _check_match(averages, params)

    def averaged(path: tuple[Any, ...], p: Any) -> Any:
        average = averages.get(path)  # a mask may be a prefix of the tree
        if average is None or _is_masked(average):
            return p
        return decoded_near(average, p).astype(jnp.result_type(p))

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


def _is_one(node: Any) -> bool:
    """Whether this is the average of one leaf, or stands in its place."""
    return _is_masked(node) or _is_coded(node) or came_apart(node)


def _is_coded(node: Any) -> bool:
    return isinstance(node, NearArray)


def _check_match(averages: dict[Any, Any], params: optax.Params) -> None:
    """Refuses parameters that are others than those of which there are averages."""
    masked = {path for path, average in averages.items() if _is_masked(average)}
    shapes = {p: a.shape for p, a in averages.items() if p not in masked}
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
