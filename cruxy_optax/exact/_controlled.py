"""AdamW under a control law on exact scalars, with exact signals."""

from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cruxy_control import driving
from cruxy_control.checks import check_range
from cruxy_control.law import Law, check_excess, check_law, needs_alignment
from cruxy_control.meta3 import Meta3
from cruxy_control.usual import USUAL, told_the_end, usual_law
from cruxy_exact.driven import Driven, DrivenState, Group, Leaf
from cruxy_optax._actuators.average import AverageIteratesState
from cruxy_optax.exact._frame import frame
from cruxy_optax.exact._gradients import settled
from cruxy_optax.exact._optimizers import Mask, adamw, decays_of, rate_of, zeros


class ControlledState(NamedTuple):
    """What `controlled` and `self_driving` keep."""

    driven: DrivenState  # the law's own, and what the limit and the schedule left in the last step
    mu: optax.Updates  # first moments, like the parameters
    nu: optax.Updates  # second moments, like the parameters
    mu_decay: jax.Array  # product of the decay rates so far; shape=(), dtype=float32
    nu_decay: jax.Array  # likewise
    average: Any  # AverageIteratesState of the parameters; None where none is kept


def controlled(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    mask: Mask = None,
    *,
    law: Law | None = None,
    nesterov: bool = False,
    relative_limit: float | None = None,
    averaging: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW under Meta3, with the bits of `cruxy_torch.exact.Controlled`, the same everywhere.

    What is sensed of the raw gradient are exact sums, the law runs on exact scalars, and the step
    has the clip, the rate and the decay rates that the law orders. A step whose gradient is not
    finite moves nothing.

    Args:
        learning_rate: that the law scales; at least 0, above 0 under a law that finds the rate. Or
            a schedule of `exact` of the number of good steps.
        b1: decay rate of the first moment, in `[0, 1)`, which the law moves.
        b2: decay rate of the second, likewise.
        eps: added to the root of the second, at least 0.
        weight_decay: decoupled, at least 0.
        mask: where weight decay applies; see `adamw`.
        law: `Meta3()` where `None`.
        nesterov: looks one step ahead.
        relative_limit: no tensor gets a rate above this share of its own root mean square, or of
            that of all parameters where that is smaller; above 0, `None` for no limit. Of tensors
            wider than 64 it falls with the root of their width.
        averaging: the power of the average of the iterates, at least 0; `None` keeps none.
            `cruxy_optax.averaged_params(opt_state, params)` has it.

    Returns:
        An `optax.GradientTransformationExtraArgs` for `exact.apply_updates`. `update` takes the
        loss as `value=`, float32 `()` or a number; it is part of the bits, and of micro-batches
        and devices it is a `grain_sum` as the gradients are. State: two moments, 8 bytes a
        parameter, 12 with the average, plus under 1 KB.

    Raises:
        ValueError: where an argument is outside its range; from `update` without `params`.
        TypeError: where `law` is none; from `update` where an array is not float32.

    Examples:
        >>> import jax.numpy as jnp
        >>> from cruxy_optax import exact
        >>> tx, params = exact.controlled(0.1), jnp.ones(2)
        >>> updates, state = tx.update(jnp.full(2, 0.5), tx.init(params), params, value=3.0)
        >>> print(exact.apply_updates(params, updates).round(4))
        [0.9242 0.9242]

    References:
        Cruxy Stability Engine White Paper v2.1.
    """
    adamw(learning_rate, b1, b2, eps, weight_decay, mask)  # which checks them
    law = Meta3() if law is None else law
    check_law(law)
    check_excess(law, remedy="leave it out")
    if needs_alignment(law) and not callable(learning_rate):
        remedy = "leave it out"
        check_range("learning_rate", learning_rate, 0.0, lower_open=True, remedy=remedy)
    if relative_limit is not None:
        remedy = "use 0.1, or None for no limit"
        check_range("relative_limit", relative_limit, 0.0, lower_open=True, remedy=remedy)
    if averaging is not None:
        check_range("averaging", averaging, 0.0, remedy="use 16, or None for no average")
    driven = Driven(law, driving, nesterov, relative_limit, averaging)
    rate = rate_of(learning_rate)

    def init_fn(params: optax.Params) -> ControlledState:
        with frame():
            one, average = jnp.ones((), jnp.float32), None
            kept = driven.init(one * 0, xp=jnp)
            if averaging is not None:
                copies = jax.tree.map(lambda p: jnp.array(p, copy=True), params)
                average = AverageIteratesState(copies, jnp.zeros((), jnp.int32))
            return ControlledState(kept, zeros(params), zeros(params), one, one, average)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value: chex.Numeric | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ControlledState]:
        del extra_args
        with frame():
            updates = settled(updates)
            if not any(g.size for g in jax.tree.leaves(updates)):
                return updates, state
            decays, treedef = decays_of(params, weight_decay, mask)
            columns = [treedef.flatten_up_to(t) for t in (params, updates, state.mu, state.nu)]
            averages = state.average and treedef.flatten_up_to(state.average.average)
            columns.append(averages or [None] * len(decays))
            leaves = [Leaf(*row) for row in zip(*columns, decays, strict=True)]
            products = state.mu_decay, state.nu_decay
            group = Group(rate(state.driven.count), b1, b2, eps, products)
            loss = None if value is None else jnp.asarray(value, jnp.float32)
            kept, (products,), moved = driven.step(state.driven, [group], leaves, loss, xp=jnp)
            change, mu, nu, average = (
                treedef.unflatten(column) for column in zip(*moved, strict=True)
            )
            if state.average is not None:
                state = state._replace(average=AverageIteratesState(average, kept.count))
            out = jax.tree.map(lambda x: -x, change)
        return out, ControlledState(kept, mu, nu, *products, state.average)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def self_driving(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Mask = None,
    *,
    law: Law | None = None,
    total_steps: int | None = None,
    nesterov: bool = True,
    relative_limit: float | Literal["usual"] | None = "usual",
    averaging: float | None = 16.0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW without a learning rate, a warm-up or a schedule, exactly.

    `controlled` with what is usual for `cruxy_control.SelfDriving`, and the bits of
    `cruxy_torch.exact.SelfDriving`: the rate follows how gradient and momentum agree, the relative
    limit bounds what a step moves, and `cruxy_optax.averaged_params(opt_state, params)` is the
    average of the iterates, which is what to evaluate and keep.

    Args:
        learning_rate: where the search starts; above 0. Leave it out.
        b1: decay rate of the first moment, in `[0, 1)`.
        b2: decay rate of the second, in `[0, 1)`.
        eps: added to the root of the second, at least 0.
        weight_decay: decoupled, at least 0.
        mask: where weight decay applies; see `adamw`.
        law: `SelfDriving()` where `None`.
        total_steps: of the run, where they are known: the rate then falls to 0 at the end.
        nesterov: looks one step ahead.
        relative_limit: see `controlled`; 0.1.
        averaging: see `controlled`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; see `controlled`.

    Raises:
        ValueError: where an argument is outside its range, or `total_steps` meets a law that finds
            no rate; from `update` without `params`.
        TypeError: where `law` is none; from `update` where an array is not float32.

    Examples:
        >>> import jax, jax.numpy as jnp, cruxy_optax
        >>> from cruxy_optax import exact
        >>> tx, params = exact.self_driving(), jnp.array([1.0, 2.0])
        >>> state, update = tx.init(params), jax.jit(tx.update)
        >>> for _ in range(100):
        ...     updates, state = update(2.0 * (params - 5.0), state, params)
        ...     params = exact.apply_updates(params, updates)
        >>> print(cruxy_optax.averaged_params(state, params).round(1))
        [5. 5.]

    References:
        Those of `cruxy_optax.self_driving`.
    """
    law = usual_law("adam", ends=total_steps is not None) if law is None else law
    law = told_the_end(law, total_steps)
    limit = USUAL["adam"].relative_limit if isinstance(relative_limit, str) else relative_limit
    options = {"nesterov": nesterov, "relative_limit": limit, "averaging": averaging}
    return controlled(learning_rate, b1, b2, eps, weight_decay, mask, law=law, **options)
