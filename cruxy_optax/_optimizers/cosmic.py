"""`cosmic`: as much of Adam's state as fits a budget of bytes, under the controller."""

from collections.abc import Mapping, Sequence

import chex
import jax
import optax

from cruxy_control.law import Law, needs_alignment
from cruxy_control.meta3 import Meta3
from cruxy_control.tiers import parse_bytes
from cruxy_optax._actuators.rate import scale_by_meta_learning_rate, throttle_by_phase
from cruxy_optax._actuators.tiers import scale_by_tiers
from cruxy_optax._memory.estimate import tree_bytes
from cruxy_optax._optimizers.parts import Mask, decayed
from cruxy_optax._stabilize import stabilize


def cosmic(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    state_budget: int | str = "64MB",
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    state_bits: int = 32,
    hysteresis: float = 0.2,
    tiers: Mapping[str, int] | None = None,
    law: Law = Meta3(),
    bounds: tuple[float, float] | None = None,
    axis_names: str | Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    r"""As much of Adam as fits a budget of bytes, under the Meta3 controller.

    Each tensor is at one of three tiers:

    | tier | update | state of its own |
    |---|---|---|
    | 0 | $0.2\,\mathrm{sign}(g)$ | none |
    | 1 | $0.2\,\mathrm{sign}(g) \sqrt{\bar{v} / v}$, the root within 0.5 to 2 | $v$, 4 bytes |
    | 2 | Adam's, as in `meta3` | two moments, 8 bytes a parameter or less with `state_bits` |

    At tier 1 $v$ is the averaged mean square of the tensor's gradient and $\bar{v}$ the mean of $v$
    over that tier. A sign counts 0.2, about what an update of Adam's has as its root mean square,
    so that one rate, as for Adam, serves all tiers.

    Beside that every tensor has two averages of its gradient's size (8 bytes), from which the plan
    is made: promotions go to where they gain most per byte (`cruxy_control.tiers.fill`), and
    nothing ever exceeds the budget, the controller and all counters included. The first plan knows
    no gradients and takes all for equally large. Call `retier` from time to time, outside the
    jitted step, to plan anew.

    The averages also gate each tensor's step: while its gradient is larger than it used to be, the
    step shrinks by that factor, to a tenth at most; a gradient that becomes smaller changes
    nothing.

    Args:
        learning_rate: a constant of at least 0, or a schedule of the number of good steps.
        state_budget: bytes for all of the state: a number, or a text such as `"64MB"` (a million
            bytes each) or `"0.5 GiB"`.
        b1: base of the first moment's decay at tier 2, in `[0, 1)`.
        b2: base of the second moment's decay at tier 2, in `[0, 1)`.
        eps: added to the root of the second moment, at least 0.
        weight_decay: decoupled weight decay, at least 0, or a schedule; multiplied by the rate.
        mask: where weight decay applies; see `meta3`.
        state_bits: 32, 16 (the first moment in bfloat16), 8 or 4 bits an element of the moments.
        hysteresis: at least 0. What a tensor holds already counts `1 + hysteresis` times, which
            keeps two tensors from taking turns.
        tiers: a plan to start from, tier by path; `None` plans. What a checkpoint of a
            re-tiered run is restored into: `dict(tier_plan(opt_state).tiers)`.
        law: the controller with its constants.
        bounds: absolute bounds on the meta learning rate; see `scale_by_meta_learning_rate`.
        axis_names: axes of an enclosing `jax.shard_map` or `jax.pmap` over which parameters are
            copies, not split; see `stabilize`. Split ones belong under `jax.jit`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; see `meta3`.

    Raises:
        ValueError: where an argument is outside its range, or the law steers by the first
            moment (`SelfDriving`); from `init` where the budget is below
            what the lowest tier of every tensor takes (the message says how much that is), or
            `tiers` names other tensors or exceeds the budget.
        TypeError: where `state_budget` is no size, a parameter is complex or `law` is none.

    Examples:
        >>> import jax, jax.numpy as jnp, cruxy_optax
        >>> params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
        >>> tx = cruxy_optax.cosmic(learning_rate=1e-3, state_budget="2KB")
        >>> state = tx.init(params)
        >>> dict(cruxy_optax.tier_plan(state).tiers)
        {"['b']": 2, "['w']": 1}
        >>> cruxy_optax.estimate_memory(params, tx).state <= 2000
        True
    """
    if needs_alignment(law):
        raise ValueError(
            "law must not steer by the first moment, of which cosmic() keeps that of some tensors "
            f"only, and may drop it at the next plan, got {type(law).__name__}; use Meta3(), or "
            "self_driving() with state_bits=4."
        )
    rest = (
        *decayed(weight_decay, mask, law),
        throttle_by_phase(),
        scale_by_meta_learning_rate(learning_rate, bounds=bounds),
    )
    reserved = tree_bytes(jax.eval_shape(stabilize(optax.chain(*rest), law).init, ()))
    tiered = scale_by_tiers(
        parse_bytes("state_budget", state_budget),
        b1,
        b2,
        eps,
        state_bits=state_bits,
        hysteresis=hysteresis,
        tiers=tiers,
        reserved=reserved,
    )
    return stabilize(optax.chain(tiered, *rest), law=law, axis_names=axis_names)
