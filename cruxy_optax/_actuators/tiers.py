"""State under a byte budget: each tensor at one of three tiers, planned anew between steps.

Shapes never change inside a step. Which tensor has which tier is part of the state's tree
structure, so that after `retier` a jitted step compiles once more.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cruxy_control import filters
from cruxy_control.checks import check_range
from cruxy_control.controls import Controls
from cruxy_control.tiers import (
    MOMENTS,
    SCALAR,
    SIGN_STEP,
    Candidate,
    averaged_square,
    check_plan,
    fill,
    noise_gate,
    observe,
    parse_bytes,
    relative_scale,
    report,
)
from cruxy_optax._actuators.moments import ScaleByControlledAdamState, scale_by_controlled_adam
from cruxy_optax._controls import materialize, require_controls
from cruxy_optax._distributed.axes import mean_over_shards
from cruxy_optax._flax import tell_flax
from cruxy_optax._memory.estimate import tree_bytes
from cruxy_optax._memory.quantize import check_bits, in_bits
from cruxy_optax._sensors.power_sums import power_sums
from cruxy_optax._tree import at, field, find, nodes_with_paths, root, unshared


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TierPlan:
    """Which tensor is at which tier; a part of the state's structure, without arrays.

    Attributes:
        tiers: pairs (path, tier) in the order of the parameters. `dict(plan.tiers)` as the
            argument `tiers` of `cosmic` starts from this plan.
        budget: bytes that the state may take.
        reserved: bytes of it for what stands around the tiers, such as the controller.
        hysteresis: what a tensor has already counts this much more than 1.
        state_bits: bits an element of the moments.
    """

    tiers: tuple[tuple[str, int], ...]
    budget: int
    reserved: int
    hysteresis: float
    state_bits: int

    def __post_init__(self) -> None:
        tell_flax(TierPlan, structure=("tiers", "state_bits"))


class ScaleByTiersState(NamedTuple):
    """What every tensor has, and what each has for itself."""

    plan: Any  # a TierPlan: structure, no leaf
    count: jax.Array  # good steps so far; shape=(), dtype=int32
    averages: filters.Windows  # of gradient sizes, float32; values (tensors,), weights ()
    tensors: Any  # like the parameters: EmptyState, float32 of shape (), or a state of moments

    def as_built(self, updates: optax.Updates) -> "ScaleByTiersState":
        """The state as `init` builds it, from one whose tensors' states came apart into mappings.

        nnx keeps each tensor's in a box, and gives back its fields by name.
        """
        grads, tree = jax.tree.flatten(updates)
        own = tree.flatten_up_to(self.tensors)
        for index, (state, g) in enumerate(zip(own, grads, strict=True)):
            if isinstance(state, Mapping):
                like = jax.eval_shape(_moments(index, self.plan.state_bits).init, g)
                own[index] = jax.tree_util.tree_map_with_path(
                    lambda path, _, fields=state: at(fields, path), like
                )
        return self._replace(tensors=tree.unflatten(own))

    no_first_moment = (
        "scale_by_tiers() keeps that of some tensors only, and may drop it at the next plan"
    )

    @property
    def telemetry(self) -> tuple[str, ...]:
        """The decay rates, where a tensor has moments; all that have them have the same."""
        return ("beta1", "beta2") if self._moments else ()

    @property
    def beta1(self) -> jax.Array:
        """This step's decay rate of the first moments."""
        return field(self._moments[0], "beta1")

    @property
    def beta2(self) -> jax.Array:
        """This step's decay rate of the second moments."""
        return field(self._moments[0], "beta2")

    @property
    def _moments(self) -> list[Any]:
        found = nodes_with_paths(self.tensors, _is_adam)
        return [node for _, node in found]


def _is_adam(node: Any) -> bool:
    apart = isinstance(node, Mapping) and "nu_decay" in node  # see `as_built`
    return apart or isinstance(node, ScaleByControlledAdamState)


def scale_by_tiers(
    state_budget: int | str,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    state_bits: int = 32,
    hysteresis: float = 0.2,
    tiers: Mapping[str, int] | None = None,
    reserved: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Each tensor's direction at its tier: sign, scaled sign, or Adam's; see `cosmic`.

    Args:
        state_budget: bytes for this state and what is reserved.
        b1: base of the first moment's decay at tier 2.
        b2: base of the second moment's decay at tier 2.
        eps: added to the root of the second moment.
        state_bits: 32, 16, 8 or 4 bits an element of the moments.
        hysteresis: at least 0; see `cosmic`.
        tiers: a plan to start from, tier by path; `None` makes one.
        reserved: bytes of the budget that other parts of the optimizer take.

    Returns:
        An `optax.GradientTransformationExtraArgs`, for use inside `stabilize`. It clips by the
        controller's factor itself, since its averages are of raw gradients.

    Raises:
        ValueError: where an argument is outside its range; from `init` where the plan does not
            fit; from `update` outside `stabilize`.
        TypeError: where `state_budget` is no size.
    """
    budget = parse_bytes("state_budget", state_budget)
    remedy = "0.2 keeps what is nearly as good"
    hysteresis = check_range("hysteresis", hysteresis, 0.0, remedy=remedy)
    state_bits = check_bits("state_bits", state_bits)
    _moments(0, state_bits, b1, b2, eps)  # checks them

    def init_fn(params: optax.Params) -> ScaleByTiersState:
        plan = TierPlan((), budget, reserved, hysteresis, state_bits)
        leaves, tree = jax.tree.flatten(params)
        if _is_placeholder(params):
            own_plan: Any = params  # which stands for every tree like the parameters, plan included
            return _initial(own_plan, params, 0)
        candidates, fixed = _candidates(plan, params, np.ones(len(leaves)))
        chosen = (
            fill(candidates, budget, fixed=fixed)
            if tiers is None
            else check_plan(candidates, tiers, budget, fixed=fixed)
        )
        own = [
            _start(tier, p, index, state_bits, 0.0)
            for index, (p, tier) in enumerate(zip(leaves, chosen.values(), strict=True))
        ]
        plan = dataclasses.replace(plan, tiers=tuple(chosen.items()))
        return _initial(plan, tree.unflatten(own), len(leaves))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        controls: Controls | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByTiersState]:
        del params, extra_args
        controls = require_controls(controls, "scale_by_tiers")
        grads, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, updates))
        own = tree.flatten_up_to(state.tensors)
        at = [tier for _, tier in state.plan.tiers]
        squares = [mean_over_shards(power_sums(g, 2.0)[0], g) for g in grads]
        averages = observe(state.averages, root(_stack(squares)), xp=jnp)
        factors = noise_gate(averages, xp=jnp)

        weight = state.averages.slow.weight
        for index, tier in enumerate(at):
            if tier == SCALAR:
                own[index] = averaged_square(own[index], weight, squares[index])
        group = _stack([v for v, tier in zip(own, at, strict=True) if tier == SCALAR])
        mean = jnp.mean(group) if len(group) else weight
        scalars = [
            factors[index] * relative_scale(own[index], mean, xp=jnp)
            if tier == SCALAR
            else factors[index]
            for index, tier in enumerate(at)
        ]
        scalars = materialize(*scalars) if scalars else ()
        directions = []
        for index, (g, tier, factor) in enumerate(zip(grads, at, scalars, strict=True)):
            direction: Any = SIGN_STEP * jnp.sign(g)
            if tier == MOMENTS:
                adam = _moments(index, state_bits, b1, b2, eps)
                clipped = g * controls.clip_scale
                direction, own[index] = adam.update(clipped, own[index], controls=controls)
            directions.append(direction * factor)
        state = state._replace(
            count=optax.safe_increment(state.count),
            averages=averages,
            tensors=tree.unflatten(own),
        )
        return tree.unflatten(directions), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def tier_plan(opt_state: Any) -> TierPlan:
    """The plan in force.

    Args:
        opt_state: any pytree with the state of one `cosmic` or `scale_by_tiers` in it.

    Raises:
        ValueError: where there is none, or more than one.
    """
    return _find(opt_state).plan


def retier(
    opt_state: Any,
    params: optax.Params,
    *,
    state_budget: int | str | None = None,
    log: str | Path | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Plans the tiers anew, from what the averages have seen; call it between steps.

    It reads a few numbers a tensor from the device and waits for them. Tensors that keep their
    tier keep their state as it is; one that comes to tier 2 starts with empty moments and a bias
    correction of its own. The state that comes back has another structure where a tier changed, so
    a jitted step compiles once more; every few hundred steps is often enough.

    Args:
        opt_state: any pytree with the state of one `cosmic` in it.
        params: the parameters, for the shapes and shardings of new moments.
        state_budget: from now on, as in `cosmic`, a smaller or a larger one; `None` keeps the one
            that the state was made with.
        log: a file to which the second result is appended as a line of JSON; `None` for none.

    Returns:
        The new state, and what was done: `step`, `budget`, `bytes` (of state, after it), `tensors`
        (how many at each tier), `transitions` (a list of `name`, `from`, `to`, `rms`, `bytes`) and
        `gates` (those below 1, by path).

    Raises:
        ValueError: where there is no such state in `opt_state` or more than one, `params` has
            other tensors than it, or the budget is below what the lowest tier of every tensor
            takes.
        TypeError: where `state_budget` is no size.

    Examples:
        >>> import jax.numpy as jnp, cruxy_optax
        >>> params = {"body": jnp.ones((64, 64)), "head": jnp.ones((64, 64))}
        >>> tx = cruxy_optax.cosmic(learning_rate=1e-3, state_budget="40KB")
        >>> state = tx.init(params)
        >>> dict(cruxy_optax.tier_plan(state).tiers)
        {"['body']": 2, "['head']": 1}
        >>> grads = {"body": 1e-3 * params["body"], "head": params["head"]}
        >>> _, state = tx.update(grads, state, params)
        >>> state, done = cruxy_optax.retier(state, params)
        >>> for change in done["transitions"]:
        ...     print("moved", change["name"], "from", change["from"], "to", change["to"])
        moved ['body'] from 2 to 1
        moved ['head'] from 1 to 2
    """
    node = _find(opt_state)
    plan, before = node.plan, dict(node.plan.tiers)
    if state_budget is not None:
        plan = dataclasses.replace(plan, budget=parse_bytes("state_budget", state_budget))
    averages, count = jax.device_get((node.averages, node.count))
    seen = averages.slow.weight > 0.0
    rms = averages.slow.value if seen else np.ones(len(before))
    candidates, fixed = _candidates(plan, params, rms)
    if [candidate.name for candidate in candidates] != list(before):
        raise ValueError(
            f"params must be what the state was made for, {len(before)} tensors, got "
            f"{len(candidates)} or others; pass the parameters that tx.init had."
        )
    after = fill(candidates, plan.budget, fixed=fixed, current=before, hysteresis=plan.hysteresis)
    leaves, tree = jax.tree.flatten(params)
    own = tree.flatten_up_to(node.tensors)
    for index, name in enumerate(before):
        if after[name] != before[name]:
            square = float(rms[index]) ** 2 if seen else 0.0
            own[index] = _start(after[name], leaves[index], index, plan.state_bits, square)
    plan = dataclasses.replace(plan, tiers=tuple(after.items()))
    new = unshared(node._replace(plan=plan, tensors=tree.unflatten(own)))
    gates = dict(zip(before, map(float, noise_gate(averages, xp=np)), strict=True))
    done = report(
        candidates, before, after, gates, step=int(count), budget=plan.budget, fixed=fixed
    )
    if log is not None:
        with Path(log).open("a", encoding="utf-8") as file:
            file.write(json.dumps(done, allow_nan=False) + "\n")
    opt_state = jax.tree.map(lambda n: new if _is_tiers(n) else n, opt_state, is_leaf=_is_tiers)
    return opt_state, done


def _moments(
    index: int, bits: int, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Adam for one tensor, number `index`; the first state is the same whatever the rates."""
    return optax.with_extra_args_support(
        in_bits(bits, None, lambda dtype: scale_by_controlled_adam(b1, b2, eps, dtype), seed=index)
    )


def _initial(plan: Any, tensors: Any, number: int) -> ScaleByTiersState:
    zeros, weight = jnp.zeros(number, jnp.float32), jnp.zeros((), jnp.float32)
    return ScaleByTiersState(
        plan=plan,
        count=jnp.zeros((), jnp.int32),
        averages=filters.Windows(filters.Ema(zeros, weight), filters.Ema(zeros, weight)),
        tensors=tensors,
    )


def _is_placeholder(params: optax.Params) -> bool:
    """Whether this is what `optax.tree.map_params` has `init` put in place of the parameters.

    A node of a class of its own without leaves. What it does with it is done to what is at its
    place in a state.
    """
    structure = jax.tree.structure(params)
    empty = structure.num_leaves == 0 and structure.num_nodes == 1
    return empty and params is not None and not isinstance(params, dict | list | tuple)


def _start(tier: int, param: Any, index: int, bits: int, square: float) -> Any:
    """A tensor's state on its first step at a tier."""
    if tier == MOMENTS:
        return _moments(index, bits).init(param)
    return jnp.full((), square, jnp.float32) if tier == SCALAR else optax.EmptyState()


def _candidates(
    plan: TierPlan, params: optax.Params, rms: np.ndarray
) -> tuple[list[Candidate], int]:
    """All tensors with what each tier of theirs takes, and the bytes that no plan changes."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    candidates = []
    for index, (path, leaf) in enumerate(flat):
        shape = jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
        moments = tree_bytes(jax.eval_shape(_moments(index, plan.state_bits).init, shape))
        name = jax.tree_util.keystr(path)
        candidates.append(Candidate(name, shape.size, (0, 4, moments), float(rms[index])))
    # Two averages a tensor, their weights and the counter.
    return candidates, plan.reserved + 8 * len(flat) + 12


def _stack(scalars: list[jax.Array]) -> jax.Array:
    return jnp.stack(scalars) if scalars else jnp.zeros(0, jnp.float32)


def _is_tiers(node: Any) -> bool:
    return isinstance(node, ScaleByTiersState)


def _find(opt_state: Any) -> ScaleByTiersState:
    found = find(opt_state, ScaleByTiersState)
    if len(found) != 1:
        raise ValueError(
            "opt_state must have the state of one cosmic() or scale_by_tiers() in it, got "
            f"{len(found)}; pass the state of that optimizer."
        )
    return found[0]
