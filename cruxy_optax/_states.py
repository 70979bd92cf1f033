"""What the state of an actuator says of itself: all that the loop and telemetry know of one.

A state is a `NamedTuple`. Its class may have any of these names, as a plain attribute, a field or
a property; what it does not have is not said.

- `first_moment`: an average of past gradients, a tree like the parameters, `None` in place of a
  tensor that has none. A law that steers by the alignment, `SelfDriving`, compares the gradient
  with it.
- `iterate_average`: an average of the parameters, a tree like them. A law that moves its set point
  by the excess over it reads it.
- `no_first_moment`: a text, why such a law cannot be served although there may be some.
- `held_by_controls = True`: on a skipped step, where the gradient is 0, both betas are 1 and the
  rate is 0, the state comes out as it went in. Without it `stabilize` keeps the old leaves beside
  the new ones and chooses.
- `limit_scale`: the largest share of the rate that a relative limit left any tensor, a scalar, 0
  where the rate was 0. Such a law takes the rest of its rate back, and learns nothing of a step in
  which nothing moved: neither of all tensors where it is 0 in every state that says it, nor of
  those whose first moment stands in the same chain as a 0.
- `direction_kind`: `"lion"` where what comes out are signs, `"muon"` where matrices are made
  orthogonal; without it a direction counts as `"adam"`, whose elements have size 1 or less and
  shrink. `self_driving(direction=)` takes the limits, set point and decay that go with it.
- `base_rate`: the learning rate that was set, before every factor of the law, a scalar. Of several
  the largest counts. Such a law obeys a schedule by it.
- `casts_updates = True`: updates come out in the dtype in which they are to be added. Without it
  `stabilize` casts them to that of the parameters.
- `telemetry`: the names of the scalars in the state that `telemetry` shows, such as `("beta1",)`.
- `as_built(updates)`: a method that gives the state as `init` builds it, from one that a tool gave
  back in another form, and itself where there is nothing to mend. `stabilize` calls it first.
- `rate_factor`: a factor on the update beside the learning rate of the same chain, a scalar, which
  `telemetry` counts into `learning_rate`.

The states of optax say nothing of the kind. Of them the first moments of Adam, AMSGrad, AdaBelief,
Lion, Muon, `trace` and `ema` are known.
"""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cruxy_optax._low_bit import is_low_bit
from cruxy_optax._near_array import NearArray
from cruxy_optax._tree import find, nodes_with_paths

_MOMENTS_OF_OPTAX: dict[type, str] = {
    optax.EmaState: "ema",
    optax.ScaleByAdamState: "mu",
    optax.ScaleByAmsgradState: "mu",
    optax.ScaleByBeliefState: "mu",
    optax.ScaleByLionState: "mu",
    optax.TraceState: "trace",
    optax.contrib.MuonState: "mu",
}
"""optax's own states that hold a first moment, and what they call it."""

_KINDS_OF_OPTAX = {optax.ScaleByLionState: "lion", optax.contrib.MuonState: "muon"}


def says(node: Any, name: str) -> bool:
    """Whether the class of a state has this name, and what is said is not false."""
    return hasattr(type(node), name) and getattr(node, name) is not False


def states_that_say(state: Any, name: str) -> list[tuple[tuple[Any, ...], Any]]:
    """Every state of which this is so, with its path; what is below such a one is not searched."""
    return nodes_with_paths(state, lambda node: says(node, name))


class Moment(NamedTuple):
    """The first moment of a leaf.

    Attributes:
        value: an array, coded or not.
        moved: whether the step before moved the leaf, its own rate above 0; bool, `()`. `None`
            where one rate moves all leaves: then `limit_scale` has it.
    """

    value: Any
    moved: jax.Array | None


def state_classes(state: optax.OptState) -> list[str]:
    """The names of the classes of all states in a state, a state before those inside it."""
    found: list[str] = []

    def seen(node: Any) -> bool:
        if hasattr(type(node), "_fields"):
            found.append(type(node).__name__)
        return False

    jax.tree.flatten(state, is_leaf=seen)
    return found


def first_moments(updates: optax.Updates, state: optax.OptState) -> list[Moment | None]:
    """The first moment of every leaf of the gradients, `None` where none keeps one.

    Of several the last one counts, whose output is what comes nearest to the update.

    Raises:
        ValueError: where there is none at all, a state has a reason to give none, or its moments
            are no tree like the gradients.
    """
    for _, node in states_that_say(state, "no_first_moment"):
        raise ValueError(
            f"law must not steer by the first moment, of which {node.no_first_moment}; use "
            "Meta3(), or scale_by_controlled_adam() in its place."
        )
    structure = jax.tree.structure(updates)
    found: list[Moment | None] = [None] * structure.num_leaves
    rates = states_that_say(state, "limit_scale")
    for path, node in nodes_with_paths(state, _has_first_moment):
        moved = _moved(path, rates) if len(rates) > 1 else None
        for i, moment in enumerate(_moments(updates, node)):
            if jax.tree.leaves(moment):  # not None, nor what `optax.masked` leaves in its place
                found[i] = Moment(moment, moved)
    if all(moment is None for moment in found) and found:
        known = ", ".join(dict.fromkeys(state_classes(state))) or "no state at all"
        raise ValueError(
            "the law needs the alignment of gradients with a first moment, but inner keeps none "
            f"that is known, got {known}; put scale_by_controlled_adam(), "
            "scale_by_controlled_lion() or optax's Adam, Lion, trace or ema into it, or give the "
            "class of its state a property first_moment that returns its average of past gradients."
        )
    return found


def iterate_averages(updates: optax.Updates, state: optax.OptState) -> list[Any]:
    """The average of every leaf of the parameters, `None` where none is kept.

    Raises:
        ValueError: where there is none at all.
    """
    found: list[Any] = [None] * len(jax.tree.leaves(updates))
    for _, node in states_that_say(state, "iterate_average"):
        averages, structure = jax.tree.flatten(node.iterate_average, is_leaf=_is_one_average)
        own: list[Any] = []
        for average, part in zip(averages, structure.flatten_up_to(updates), strict=True):
            masked = isinstance(average, optax.MaskedNode)  # it may stand for a whole branch
            own += [None] * len(jax.tree.leaves(part)) if masked else [average]
        found = [old if new is None else new for old, new in zip(found, own, strict=True)]
    if all(average is None for average in found) and found:
        raise ValueError(
            "the law needs the excess of the parameters over an average of them, but inner keeps "
            "none; put average_iterates() last in it, or give the law excess_share=None."
        )
    return found


def _is_one_average(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode | NearArray)


def as_built(state: optax.OptState, updates: optax.Updates) -> optax.OptState:
    """The state with those parts as `init` builds them that can say how."""
    if not states_that_say(state, "as_built"):
        return state

    def mended(node: Any) -> Any:
        return node.as_built(updates) if says(node, "as_built") else node

    return jax.tree.map(mended, state, is_leaf=lambda node: says(node, "as_built"))


def _moved(path: tuple[Any, ...], rates: list[tuple[Any, Any]]) -> jax.Array | None:
    """Whether the rates in the chain of a state at this path, or in one around it, were above 0."""
    own = [node.limit_scale > 0.0 for where, node in rates if path[: len(where) - 1] == where[:-1]]
    return jnp.stack(own).all() if own else None


def limit_scale(state: optax.OptState) -> jax.Array:
    """The largest share of its rate that a tensor got in the step before; 0 if all were 0."""
    scales = [node.limit_scale for _, node in states_that_say(state, "limit_scale")]
    return jnp.stack(scales).max() if scales else jnp.ones((), jnp.float32)


def base_rate(state: optax.OptState) -> jax.Array:
    """The largest rate that was set in the step before; 0 where no state says it."""
    rates = [node.base_rate for _, node in states_that_say(state, "base_rate")]
    return jnp.stack(rates).max() if rates else jnp.zeros((), jnp.float32)


def direction_kind(state: optax.OptState) -> str:
    """`"muon"` where a state says so, else `"lion"` where one does, else `"adam"`."""
    said = [node.direction_kind for _, node in states_that_say(state, "direction_kind")]
    said += [kind for cls, kind in _KINDS_OF_OPTAX.items() if find(state, cls)]
    return next((kind for kind in ("muon", "lion") if kind in said), "adam")


def _has_first_moment(node: Any) -> bool:
    return type(node) in _MOMENTS_OF_OPTAX or says(node, "first_moment")


def _moments(updates: optax.Updates, node: Any) -> list[Any]:
    """The first moments of one state, one a leaf of the gradients."""
    moments = getattr(node, _MOMENTS_OF_OPTAX.get(type(node), "first_moment"))
    structure = jax.tree.structure(updates)
    with contextlib.suppress(TypeError, ValueError):
        return structure.flatten_up_to(moments)
    try:
        return structure.flatten_up_to(_in_full(moments, updates))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"first_moment of {type(node).__name__} must be a tree like the parameters, got "
            f"{jax.tree.structure(moments)} for {structure}; give None in place of a tensor that "
            "has none."
        ) from error


def _in_full(moments: Any, updates: optax.Updates) -> Any:
    """The moments with a mask for each leaf where one stands for a whole branch."""

    def full(moment: Any, part: Any) -> Any:
        masked = isinstance(moment, optax.MaskedNode)
        return jax.tree.map(lambda _: moment, part) if masked else moment

    return jax.tree.map(full, moments, updates, is_leaf=_is_one_moment)


def _is_one_moment(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode) or is_low_bit(node)
