"""`stabilize`: measures the raw gradient, steps the law, guards, hands out the controls."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cruxy_control.controls import Controls
from cruxy_control.law import Law, check_law, needs_alignment, needs_excess
from cruxy_control.meta3 import Meta3
from cruxy_control.signals import NOT_KNOWN, Signals
from cruxy_optax._controls import materialize_controls, storable
from cruxy_optax._distributed.axes import as_axes
from cruxy_optax._low_bit import as_built as decodable
from cruxy_optax._low_bit import is_low_bit
from cruxy_optax._low_bit import where as where_low_bit
from cruxy_optax._sensors.measure import alignment, excess, measure
from cruxy_optax._states import (
    as_built,
    base_rate,
    first_moments,
    iterate_averages,
    limit_scale,
    says,
    state_classes,
    states_that_say,
)
from cruxy_optax._tree import as_arrays, as_floating, check_real, find, unshared, where


class StabilizeState(NamedTuple):
    """The controller, what it last saw and ordered, and the state of what it controls."""

    law_state: Any  # the law's own NamedTuple of scalars and two short vectors
    signals: Signals  # of the last step; float32 scalars, NOT_KNOWN for none
    controls: Controls  # likewise, ok bool; None for what only another kind of law moves
    step: jax.Array  # good steps so far; shape=(), dtype=int32
    skipped_total: jax.Array  # shape=(), dtype=int32
    skipped_in_a_row: jax.Array  # shape=(), dtype=int32
    inner_state: optax.OptState


def stabilize(
    inner: optax.GradientTransformation,
    law: Law = Meta3(),
    *,
    axis_names: str | Sequence[str] = (),
    replica_axes: str | Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Puts a chain of actuators under a control law, and guards it.

    Each step measures the norms of the raw gradient, steps the law on them and on the loss, and
    passes the result to `inner` as the extra argument `controls`. Members of an `optax.chain`
    cannot pass anything to each other, and after the first of them the raw gradient is gone: what
    all of them need has to come from around the chain.

    A step whose gradient norm or gamma norm is not finite is skipped: parameters, moments, filters
    and schedules stay as they were, only `skipped_total` and `skipped_in_a_row` move. The guard
    decides on the device and never gives up. `inner` may contain any optax transformation; states
    that say nothing of themselves are restored leaf by leaf on a skipped step. "Write a direction
    of your own" in the documentation has what a state can say. Updates come back in the dtype of
    the parameters (of the gradients, where `params` is left out), or as `round_updates` made them
    where `inner` has one.

    `optax.masked` and `optax.partition` belong inside `stabilize`: a leaf that `stabilize` cannot
    see is neither measured nor guarded.

    Args:
        inner: an actuator, or an `optax.chain` of actuators and anything else.
        law: the control law with its constants, `Meta3()`, `StabilityV1()`, `StabilityV2()` or
            `SelfDriving()`, or `PlateauGuard` around one of them.
        axis_names: under `jax.shard_map` or `jax.pmap`, the axes over which devices have to decide
            alike: the loss is averaged over them, and the norms are taken over all shards of
            leaves split along them (told apart by `shard_map`'s `check_vma=True`, its default;
            without it every leaf counts as a copy). Not needed under `jax.jit` with sharded arrays.
        replica_axes: those along which every device has gradients of its own that nobody averages,
            as with `scale_by_voted_lion`: the mean of loss and of sums of squares is taken over
            them. None of `axis_names`.

    Returns:
        An `optax.GradientTransformationExtraArgs` whose `update` takes the loss as `value=`; left
        out, the curvature stays 0 and all else works.

    Raises:
        TypeError: where `inner` or `law` is not one, or a parameter is complex.
        ValueError: where a `stabilize` stands inside another, or the law steers by the first
            moment (`SelfDriving`) and `inner` keeps none, or `scale_by_tiers`, which may drop it.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from cruxy_control import Meta3
        >>> from cruxy_optax import (
        ...     clip_by_predicted_norm, scale_by_controlled_lion, scale_by_meta_learning_rate,
        ...     stabilize, throttle_by_phase)
        >>> tx = stabilize(
        ...     optax.chain(
        ...         clip_by_predicted_norm(),
        ...         scale_by_controlled_lion(),
        ...         throttle_by_phase(),
        ...         scale_by_meta_learning_rate(1e-3),
        ...     ),
        ...     law=Meta3(),
        ... )
        >>> params = {"w": jnp.ones(3)}
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.array([1.0, -2.0, 0.0])}, state, params, value=1.0)
        >>> print(updates["w"])
        [-0.00075  0.00075 -0.     ]
        >>> updates, state = tx.update({"w": jnp.full(3, jnp.nan)}, state, params, value=1.0)
        >>> print(updates["w"], state.skipped_total)
        [0. 0. 0.] 1
    """
    check_law(law)
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"inner must be a gradient transformation, got {inner!r}; give an actuator or "
            "optax.chain(...) of them."
        )
    axes, replicas = as_axes(axis_names), as_axes(replica_axes)
    if both := sorted({*axes} & {*replicas}):
        raise ValueError(
            f"an axis must be in axis_names or in replica_axes, got {both} in both; give it as "
            "one of replica_axes alone where gradients are not averaged."
        )
    loop = Loop(optax.with_extra_args_support(inner), law, axes, replicas)
    return optax.GradientTransformationExtraArgs(loop.init, loop.update)


class Loop(NamedTuple):
    """What `stabilize` is made of, and its two functions.

    `release_gradients` takes it apart, since it measures and updates at different times.
    """

    inner: optax.GradientTransformationExtraArgs
    law: Law
    axis_names: tuple[str, ...]
    replica_axes: tuple[str, ...] = ()

    def init(self, params: optax.Params) -> StabilizeState:
        """The state before the first step."""
        check_real(jax.tree.leaves(params))
        params = as_arrays(params)
        inner_state = self.inner.init(params)
        _refuse_nesting(inner_state)
        zero, count = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        law_state = self.law.init(zero, xp=jnp)
        not_known = jnp.full((), NOT_KNOWN, jnp.float32)
        signals = Signals(zero, zero, not_known)
        if needs_alignment(self.law):
            first_moments(params, inner_state)  # there have to be some
            signals = signals._replace(
                alignment=not_known,
                limit_scale=zero + 1.0,
                base_rate=zero,
                momentum_ratio=not_known,
            )
        if needs_excess(self.law):
            iterate_averages(params, inner_state)
            signals = signals._replace(excess=not_known)
        _, controls = self.law.step(law_state, signals, xp=jnp)
        controls = storable(controls, self.law)
        state = StabilizeState(law_state, signals, controls, count, count, count, inner_state)
        return unshared(state)

    def update(
        self,
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value: chex.Numeric | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, StabilizeState]:
        """Measures, steps the law, and has the actuators do what it orders."""
        if value is None and "loss" in extra_args:
            raise TypeError(
                "update takes the loss as value=, as optax has it, got loss=; write "
                "tx.update(grads, state, params, value=loss)."
            )
        updates, params = as_arrays(updates), as_arrays(params)
        try:
            return self._updated(updates, state, params, value, extra_args)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            if params is not None:
                self._refuse_another(updates, state, params, error)
            raise

    def _updated(
        self,
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None,
        value: chex.Numeric | None,
        extra_args: dict[str, Any],
    ) -> tuple[optax.Updates, StabilizeState]:
        inner_state = as_built(state.inner_state, updates)
        like = updates if params is None else params
        state = state._replace(inner_state=decodable(inner_state, self.inner.init, like))
        axes = (self.axis_names, self.replica_axes)
        signals = measure(updates, value, self.law.gamma, *axes)
        if needs_alignment(self.law):
            moments = first_moments(updates, state.inner_state)
            norm = signals.grad_norm
            cosine, ratio = alignment(updates, moments, norm, *axes)
            signals = signals._replace(
                alignment=cosine,
                limit_scale=limit_scale(state.inner_state),
                base_rate=base_rate(state.inner_state),
                momentum_ratio=ratio,
            )
        if needs_excess(self.law):
            averages = iterate_averages(updates, state.inner_state)
            signals = signals._replace(
                excess=jnp.full_like(signals.grad_norm, NOT_KNOWN)
                if params is None
                else excess(updates, params, averages, *axes)
            )
        law_state, controls = self.law.step(state.law_state, signals, xp=jnp)
        controls = materialize_controls(controls)
        new_updates, inner_state = controlled_update(
            self.inner, controls, updates, state.inner_state, params, value=value, **extra_args
        )
        state = state._replace(
            law_state=law_state,
            signals=signals,
            controls=storable(controls, self.law),
            inner_state=inner_state,
        )
        return new_updates, count_step(state, controls.ok)

    def _refuse_another(
        self, updates: optax.Updates, state: Any, params: optax.Params, error: Exception
    ) -> None:
        """Raises where a step has failed on a tree that is not made as that of the parameters is.

        That of the gradients, and the state, if `init` makes it of other parts.
        """
        of_updates, of_params = jax.tree.structure(updates), jax.tree.structure(params)
        if of_updates != of_params:
            raise ValueError(
                f"gradients must be a tree like the parameters, got {of_updates} for {of_params}; "
                "differentiate by the parameters that update is given."
            ) from error
        try:
            wanted = state_classes(jax.eval_shape(self.init, params))
        except Exception:  # of whatever kind: the first error says more
            return
        got = state_classes(state)
        if got == wanted:
            return
        pairs = itertools.zip_longest(got, wanted, fillvalue="nothing")
        own, other = next(pair for pair in pairs if pair[0] != pair[1])
        raise ValueError(
            f"state must be of this optimizer with these options, got {own} in the place of "
            f"{other}; build the optimizer as it was when the state was saved, and restore into "
            "what its init returns."
        ) from error


def loop_of(tx: optax.GradientTransformation) -> Loop | None:
    """The loop that a transformation is, `None` where it is not what `stabilize` returned."""
    owner = getattr(tx.update, "__self__", None)
    owner = getattr(owner, "loop", owner)
    return owner if isinstance(owner, Loop) else None


def count_step(state: StabilizeState, ok: jax.Array) -> StabilizeState:
    """The state with its counters one step on, a good one or a skipped one."""
    return state._replace(
        step=jnp.where(ok, optax.safe_increment(state.step), state.step),
        skipped_total=jnp.where(ok, state.skipped_total, optax.safe_increment(state.skipped_total)),
        skipped_in_a_row=jnp.where(ok, 0, optax.safe_increment(state.skipped_in_a_row)),
    )


def controlled_update(
    inner: optax.GradientTransformationExtraArgs,
    controls: Controls,
    updates: optax.Updates,
    inner_state: optax.OptState,
    params: optax.Params | None,
    **extra_args: Any,
) -> tuple[optax.Updates, optax.OptState]:
    """One update under these controls; where they say that the step does not count, none at all."""
    ok = controls.ok
    # Where the step is skipped nothing of the gradient may reach a sum: 0 * NaN is NaN.
    safe = jax.tree.map(lambda g: where(ok, g), updates)
    new_updates, new_state = inner.update(
        safe, inner_state, params, controls=controls, **extra_args
    )
    new_updates = jax.tree.map(lambda u: where(ok, u), new_updates)
    if not states_that_say(new_state, "casts_updates"):
        like = updates if params is None else params
        new_updates = jax.tree.map(as_floating, new_updates, like)
    return new_updates, _restore(ok, new_state, inner_state)


def _restore(ok: jax.Array, new: optax.OptState, old: optax.OptState) -> optax.OptState:
    """The old leaves on a skipped step, except in states that the controls have held already."""

    def held(node: Any) -> bool:
        return says(node, "held_by_controls")

    def choose(after: Any, before: Any) -> Any:
        if held(after):
            return jax.tree.map(recoded, after, before, is_leaf=is_low_bit)
        # Some optax states take on the dtype of the updates, which are float32 here.
        return as_floating(where(ok, after, before), before)

    def recoded(after: Any, before: Any) -> Any:
        return where_low_bit(ok, after, before) if is_low_bit(after) else after

    return jax.tree.map(choose, new, old, is_leaf=held)


def _refuse_nesting(inner_state: optax.OptState) -> None:
    if find(inner_state, StabilizeState):
        raise ValueError(
            "stabilize() must not stand inside another stabilize(), but inner has one: two "
            "controllers would steer one rate; give the inner chain its actuators alone, such as "
            "scale_by_controlled_adam() in place of meta3()."
        )
