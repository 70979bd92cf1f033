"""What the controller shows: one dictionary of scalars, from any nested optimizer state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cruxy_control.explanation import explain as sentences
from cruxy_control.signals import NOT_KNOWN
from cruxy_optax._stabilize import StabilizeState
from cruxy_optax._states import states_that_say
from cruxy_optax._tree import find_with_paths

_CONTROLS = tuple(
    "meta_scale phase_scale clip_threshold clip_scale phase curvature warning alignment".split()
)
"""What is shown of the controls of a law that does not say what it steers."""


def telemetry(opt_state: Any) -> dict[str, Any]:
    """The controller's values of the last step, found through any nesting.

    Works on what `tx.init` or `tx.update` returned, alone or inside the states of `optax.chain`,
    `masked`, `MultiSteps`, `inject_hyperparams` and the like, on a Flax `TrainState` and on
    `nnx.Optimizer.opt_state`. Nothing is read on the host: the values are device scalars (or
    tracers, inside a jitted step, which is the place to call it if the state is donated).

    Args:
        opt_state: any pytree with the state of one or more `stabilize` in it.

    Returns:
        With one controller, a flat dictionary. Of the first four lines there is what the law has
        something to say of, of the fifth and sixth what an actuator uses:

        - `meta_scale`, `phase_scale`: the slow and the fast factor on the rate
        - `clip_threshold`, `clip_scale`: the predicted norm and the factor on the gradient
        - `phase`, `curvature`, `warning`: `phi`, `c_bar`, `W`; `alignment`: the smoothed one that
          `SelfDriving` steers by
        - `run_phase`: an index into `cruxy_control.RUN_PHASES` (search, trunk, cooldown, end);
          `limit_scale`: the share of the rate that the relative limit leaves any tensor, and
          `limited_steps`: for how many steps in a row below 1; `limit_factor` on that limit;
          `schedule_scale`: the share of its highest rate that a schedule has left;
          `momentum_ratio`: `|m| / |g|`; `set_point`: the alignment that is steered to. All of
          `SelfDriving`; `explain` says them in words
        - `sign_weight`, `decay_scale`: what `PlateauGuard` moves
        - `learning_rate`: what the update was multiplied by; 0 on a skipped step. A throttle is
          counted in where it stands in the same chain or in one around it
        - `beta1`, `beta2`: the decay rates used; 1 on a skipped step
        - `grad_norm`, `gamma_norm`, `loss`: the signals
        - `ok`: whether the last step counted
        - `step`, `skipped_total`, `skipped_in_a_row`: counters

        The loss is NaN where none came, and `momentum_ratio` where gradient or momentum is 0, as in
        the first step; under `jax_debug_nans`, which stops at every NaN that a jitted step returns,
        both are infinite then.

        Where several actuators show the same (`optax.partition` inside `stabilize`) each key ends
        in the path of its actuator; so it does for the parts of `release_gradients`, whose layers
        show their mean. With several controllers, a dictionary of such dictionaries by path.

    Raises:
        ValueError: where there is no controller in it.

    Examples:
        >>> import jax.numpy as jnp, optax, cruxy_optax
        >>> tx = optax.chain(cruxy_optax.meta3(learning_rate=1e-3), optax.identity())
        >>> params = jnp.ones(3)
        >>> _, state = tx.update(params, tx.init(params), params, value=1.0)
        >>> print(cruxy_optax.telemetry(state)["learning_rate"])
        0.00075
    """
    found = find_with_paths(opt_state, StabilizeState)
    if not found:
        raise ValueError(
            "telemetry() needs a state with a controller in it, got "
            f"{type(opt_state).__name__} without one; pass the opt_state of self_driving(), "
            "self_driving_lion(), self_driving_muon(), meta3(), meta_lion(), stability_v1(), "
            "stability_v2(), axiom(), cosmic(), tiger() or stabilize()."
        )
    if len(found) == 1:
        return _read(found[0][1])
    return {jax.tree_util.keystr(path): _read(node) for path, node in found}


def explain(opt_state: Any) -> str:
    """Says in sentences what the controller does: phase of the run, what sets the rate, and why.

    Reads the values on the host, and so waits for the step. Inside `jax.jit` use `telemetry`.

    Args:
        opt_state: see `telemetry`.

    Returns:
        A few sentences; with several controllers a line each, its path in front.

    Raises:
        ValueError: where there is no controller in it, or several in one, as under `jax.vmap`.

    Examples:
        >>> import textwrap, jax.numpy as jnp, cruxy_optax
        >>> tx = cruxy_optax.self_driving(100.0)
        >>> params, state = jnp.ones(3), tx.init(jnp.ones(3))
        >>> for _ in range(3):
        ...     _, state = tx.update(params, state, params)
        >>> print(textwrap.fill(cruxy_optax.explain(state), 80))
        The rate is still looked for (step 3, rate 0.236). The relative limit (at 0.98
        of its value), not the law, sets the rate of every tensor and has for 2 steps:
        gradients do not oppose the steps (alignment 1.00). The gradient, 1.73 long, was
        clipped to 0.87 of that.
    """
    shown = jax.device_get(telemetry(opt_state))
    if "ok" in shown:
        return _said(shown)
    return "\n".join(f"{path}: {_said(own)}" for path, own in shown.items())


def _said(values: dict[str, Any]) -> str:
    if shape := np.shape(values["ok"]):
        raise ValueError(
            f"explain() is of one controller, got a state that holds an array of the shape {shape} "
            "of them, as under jax.vmap or jax.pmap; take one of them, "
            "jax.tree.map(lambda x: x[0], state)."
        )
    return sentences(values)


def _read(state: StabilizeState) -> dict[str, Any]:
    # Replicated over devices every scalar has an axis in front; released layers have one more.
    axes = getattr(_scalar(state.step), "ndim", 0)
    applied = _of_actuators(state.inner_state)
    values = {name: _mean_over_layers(value, axes) for name, value in applied.items()}
    for name in getattr(state.law_state, "telemetry", _CONTROLS):
        values[name] = _scalar(getattr(state.controls, name))
    # No form of a NaN leaves a jitted step without stopping `jax_debug_nans`.
    stops = jax.config.jax_debug_nans  # pyright: ignore[reportAttributeAccessIssue]
    nothing = jnp.inf if stops else jnp.nan
    if "momentum_ratio" in values:
        values["momentum_ratio"] = _scalar(state.controls.momentum_ratio, none=nothing)
    if "clip_threshold" in values:
        values["clip_threshold"] = _scalar(state.controls.clip_threshold, none=jnp.inf)
    for name in ("grad_norm", "gamma_norm"):
        values[name] = _scalar(getattr(state.signals, name))
    values["loss"] = _scalar(state.signals.loss, none=nothing)
    values["ok"] = _scalar(state.controls.ok)
    for name in ("step", "skipped_total", "skipped_in_a_row"):
        values[name] = _scalar(getattr(state, name))
    return values


def _of_actuators(inner_state: Any) -> dict[str, Any]:
    """What the states of actuators show, the rate first; told apart by path where they have to."""
    shown: dict[str, list[tuple[Any, Any]]] = {"learning_rate": []}
    for path, node in states_that_say(inner_state, "telemetry"):
        for name in node.telemetry:
            shown.setdefault(name, []).append((path, _scalar(getattr(node, name))))
    factors = states_that_say(inner_state, "rate_factor")
    shown["learning_rate"] = [
        (path, _throttle(rate, path, factors)) for path, rate in shown["learning_rate"]
    ]
    return {
        name if len(found) == 1 else name + jax.tree_util.keystr(path): value
        for name, found in shown.items()
        for path, value in found
    }


def _throttle(rate: Any, path: tuple[Any, ...], factors: list[tuple[Any, Any]]) -> Any:
    """The rate at this path times the factors in the same chain, or in one around it."""
    for where, node in factors:
        if path[: len(where) - 1] == where[:-1]:
            rate = rate * _scalar(node.rate_factor)
    return rate


def _scalar(leaf: Any, none: float | None = None) -> Any:
    """The array itself, where a framework (nnx) keeps each leaf in a box of its own.

    `none` is what is shown for `NOT_KNOWN`.
    """
    array = jax.tree.leaves(leaf)[0]
    return array if none is None else jnp.where(array == NOT_KNOWN, none, array)


def _mean_over_layers(value: Any, axes: int) -> Any:
    """The mean over the axes of released layers, whose states are stacked behind `axes` others."""
    behind = tuple(range(axes, getattr(value, "ndim", 0)))
    return value.mean(axis=behind) if behind else value
