"""The chain of an optimizer that finds its learning rate, for whatever kind its direction is of."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, NoReturn

import chex
import jax
import optax

from cruxy_control.checks import check_range
from cruxy_control.law import Law
from cruxy_control.usual import USUAL, Given, told_the_end, usual_average, usual_law
from cruxy_optax._actuators.clip import clip_by_predicted_norm
from cruxy_optax._actuators.kernels import matrices
from cruxy_optax._actuators.rate import scale_by_meta_learning_rate
from cruxy_optax._optimizers.parts import Mask, decayed
from cruxy_optax._stabilize import stabilize
from cruxy_optax._states import direction_kind

Limit = chex.Numeric | Literal["usual"] | None
"""A relative limit, that which is usual for the direction, or none."""


class OfItsKind(NamedTuple):
    """An optimizer around a direction of which only the state for the parameters tells the kind.

    So it is where labels or masks are trees, which fit no other parameters.
    """

    direction: optax.GradientTransformation
    make: Callable[[str], optax.GradientTransformationExtraArgs]

    @property
    def loop(self) -> NoReturn:
        """What `loop_of` asks for: none that is known before the parameters are."""
        raise ValueError(
            "gradients must be released of an optimizer that knows the kind of its direction, got "
            "one with labels or masks given as a tree; use meta3() or meta_lion()."
        )

    def init(self, params: optax.Params) -> optax.OptState:
        """The state before the first step."""
        kind = direction_kind(jax.eval_shape(self.direction.init, params))
        return self.make(kind).init(params)

    def update(
        self,
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        """One step."""
        return self.make(direction_kind(state)).update(updates, state, params, **extra_args)


def of_its_kind(
    direction: optax.GradientTransformation,
    kind: str | None,
    make: Callable[[str], optax.GradientTransformationExtraArgs],
) -> optax.GradientTransformationExtraArgs:
    """The optimizer that is made for a kind of direction, once that is known.

    Args:
        direction: what the optimizer is around.
        kind: its kind, `None` where its state alone tells it.
        make: makes the optimizer for a kind.
    """
    if kind is not None:
        return make(kind)
    make("adam")  # what is wrong with the arguments is said here
    late = OfItsKind(direction, make)
    return optax.GradientTransformationExtraArgs(late.init, late.update)


def law_of(
    kind: str,
    law: Law | None,
    averaging: Given | None,
    interpolation: Given,
    total_steps: int | None,
) -> tuple[Law, float | None, float]:
    """The law that knows the end, the power of the average, and how far that pulls."""
    ends = total_steps is not None
    power, pull = usual_average(kind, averaging, interpolation, free=law is None)
    law = usual_law(kind, ends=ends, interpolation=pull) if law is None else law
    return told_the_end(law, total_steps), power, pull


class Limits(NamedTuple):
    """What bounds the rate of each tensor, see `scale_by_meta_learning_rate`."""

    relative_limit: chex.Numeric | None
    limit_width: int | None


def limits_of(given: Limit, kind: str) -> Limits:
    """The limit that was given, or that which is usual for the direction, as it goes with width."""
    own = USUAL[kind]
    limit = own.relative_limit if isinstance(given, str) and given == "usual" else given
    return Limits(limit, own.limit_width)


def steered(
    moments: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mask: Mask,
    roles: list[optax.GradientTransformation],
    limits: Limits,
    average: list[optax.GradientTransformation],
    law: Law,
    axis_names: str | Sequence[str],
    stacked: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """The chain under the law; weight decay is for what has at least two axes without a `mask`."""
    if not callable(learning_rate):
        remedy = "leave it out, or freeze parameters with optax.set_to_zero() outside of it"
        bounds = {"lower_open": True, "upper_open": True}
        learning_rate = check_range("learning_rate", learning_rate, 0.0, **bounds, remedy=remedy)
    rate = scale_by_meta_learning_rate(learning_rate, **limits._asdict(), axis_names=axis_names)
    return stabilize(
        optax.chain(
            clip_by_predicted_norm(),
            moments,
            *decayed(weight_decay, matrices(stacked) if mask is None else mask, law),
            *roles,
            rate,
            *average,
        ),
        law=law,
        axis_names=axis_names,
    )
