"""What the controller shows: one dictionary of scalars, from any nested optimizer state."""

from typing import Any

import jax

from cruxy_optax._actuators.moments import ScaleByControlledAdamState, ScaleByControlledLionState
from cruxy_optax._actuators.rate import ScaleByMetaLearningRateState, ThrottleByPhaseState
from cruxy_optax._stabilize import StabilizeState
from cruxy_optax._tree import find_with_paths


def telemetry(opt_state: Any) -> dict[str, Any]:
    """The controller's values of the last step, found through any nesting.

    Works on what `tx.init` or `tx.update` returned, alone or inside the states of `optax.chain`,
    `masked`, `MultiSteps`, `inject_hyperparams` and the like, on a Flax `TrainState` and on
    `nnx.Optimizer.opt_state`. Nothing is read on the host: the values are device scalars (or
    tracers, inside a jitted step, which is the place to call it if the state is donated).

    Args:
        opt_state: any pytree with the state of one or more `stabilize` in it.

    Returns:
        With one controller, a flat dictionary:

        - `learning_rate`: what the update was multiplied by; 0 on a skipped step. A throttle is
          counted in where it stands in the same chain or in one around it
        - `meta_scale`, `phase_scale`: the slow and the fast factor in it
        - `beta1`, `beta2`: the decay rates used; 1 on a skipped step
        - `clip_threshold`, `clip_scale`: the predicted norm and the factor on the gradient
        - `phase`, `curvature`, `warning`: `phi`, `c_bar`, `W`
        - `alignment`: the smoothed one that `SelfDriving` steers by; 0 under other laws
        - `grad_norm`, `gamma_norm`, `loss`: the signals; the loss is NaN where none came
        - `ok`: whether the last step counted
        - `step`, `skipped_total`, `skipped_in_a_row`: counters

        Rate and betas are there if an actuator uses them; where several do (`optax.partition`
        inside `stabilize`) each key ends in the path of its actuator. With several controllers, a
        dictionary of such dictionaries by path.

    Raises:
        ValueError: where there is no controller in it.

    Example:
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
            f"{type(opt_state).__name__} without one; pass the opt_state of meta3(), meta_lion(), "
            "stability_v1(), stability_v2() or stabilize()."
        )
    if len(found) == 1:
        return _read(found[0][1])
    return {jax.tree_util.keystr(path): _read(node) for path, node in found}


def _read(state: StabilizeState) -> dict[str, Any]:
    controls, signals = state.controls, state.signals
    values: dict[str, Any] = {}

    rates = find_with_paths(state.inner_state, ScaleByMetaLearningRateState)
    throttles = find_with_paths(state.inner_state, ThrottleByPhaseState)
    for suffix, (path, node) in _suffixed(rates):
        rate = _scalar(node.learning_rate)
        for where, throttle in throttles:
            if path[: len(where) - 1] == where[:-1]:  # in the same chain, or in one around it
                rate = rate * _scalar(throttle.phase_scale)
        values["learning_rate" + suffix] = rate
    moments = find_with_paths(
        state.inner_state, (ScaleByControlledAdamState, ScaleByControlledLionState)
    )
    for suffix, (_, node) in _suffixed(moments):
        values["beta1" + suffix] = _scalar(node.beta1)
        values["beta2" + suffix] = _scalar(node.beta2)

    for name in ("meta_scale", "phase_scale", "clip_threshold", "clip_scale"):
        values[name] = _scalar(getattr(controls, name))
    for name in ("phase", "curvature", "warning", "alignment"):
        values[name] = _scalar(getattr(controls, name))
    for name in ("grad_norm", "gamma_norm", "loss"):
        values[name] = _scalar(getattr(signals, name))
    values["ok"] = _scalar(controls.ok)
    for name in ("step", "skipped_total", "skipped_in_a_row"):
        values[name] = _scalar(getattr(state, name))
    return values


def _suffixed(nodes: list[Any]) -> list[tuple[str, Any]]:
    if len(nodes) == 1:
        return [("", nodes[0])]
    return [(jax.tree_util.keystr(node[0]), node) for node in nodes]


def _scalar(leaf: Any) -> Any:
    """The array itself, where a framework (nnx) keeps each leaf in a box of its own."""
    return jax.tree.leaves(leaf)[0]
