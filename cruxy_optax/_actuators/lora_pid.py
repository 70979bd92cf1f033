"""A blend of sign and momentum, and a clip, that two PID loops a tensor steer: Tiger's for LoRA."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cruxy_control.controls import Controls
from cruxy_control.formulas.trust import AGC_EPS
from cruxy_control.lora_pid import LoraPid, LoraPidState, large_share
from cruxy_optax._actuators.directions import blend, checked_temperature, sized, steered
from cruxy_optax._actuators.trust import clipped, required
from cruxy_optax._distributed.axes import as_axes, mean_over_shards, together


class BlendByLoraPidState(NamedTuple):
    """The loops, and the state of the momentum between clip and blend."""

    pid: LoraPidState  # one number a tensor, in order; shape=(tensors,), dtype=float32
    inner_state: optax.OptState


def blend_by_lora_pid(
    momentum: optax.GradientTransformation,
    pid: LoraPid = LoraPid(),
    temperature: chex.Numeric = 1.0,
    *,
    axis_names: str | Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """`clip_by_parameter_norm`, a momentum and `blend_sign`, steered a tensor at a time.

    Each tensor has a `cruxy_control.LoraPid`. What its direction looks like (the share of large
    entries) sets how much of the momentum is blended into the sign, and how long a gradient may be
    for the size of the parameter. Both hold for the step after. It serves all tensors it is given:
    `optax.partition` with `label_roles` gives it those of LoRA. A tensor that starts at zeros, as
    LoRA's B, counts with a norm of 1e-3 in the clip.

    Args:
        momentum: what stands between clip and blend, such as `scale_by_controlled_momentum()`.
        pid: the loops with their constants.
        temperature: of `soften_sign`, at least 0.
        axis_names: axes of an enclosing `jax.shard_map` over which parameters may be split.

    Returns:
        An `optax.GradientTransformationExtraArgs`. Its state is that of `momentum`, and 13 float32
        numbers a tensor.

    Raises:
        TypeError: where `momentum` is no gradient transformation, or `pid` no `LoraPid`.
        ValueError: where `temperature` is outside its range; from `update` without `params`.

    Examples:
        >>> import jax.numpy as jnp, optax, cruxy_optax
        >>> labels = {"q": {"kernel": "rest", "lora_a": "lora", "lora_b": "lora"}}
        >>> momentum = cruxy_optax.scale_by_controlled_momentum()
        >>> direction = optax.partition(
        ...     {"lora": cruxy_optax.blend_by_lora_pid(momentum),
        ...      "rest": optax.chain(momentum, cruxy_optax.blend_sign())}, labels)
        >>> tx = cruxy_optax.stabilize(
        ...     optax.chain(direction, cruxy_optax.scale_by_meta_learning_rate(1e-2)))
        >>> params = {"q": {"kernel": jnp.ones(4), "lora_a": jnp.ones(2), "lora_b": jnp.zeros(2)}}
        >>> grads = {"q": {"kernel": jnp.ones(4), "lora_a": jnp.ones(2), "lora_b": jnp.ones(2)}}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> print(updates["q"]["lora_b"])
        [-0.01 -0.01]
    """
    if not isinstance(momentum, optax.GradientTransformation):
        raise TypeError(
            f"momentum must be a gradient transformation, got {momentum!r}; give "
            "scale_by_controlled_momentum()."
        )
    if not isinstance(pid, LoraPid):
        raise TypeError(f"pid must be a LoraPid, got {pid!r}; give cruxy_control.LoraPid().")
    temperature, axes = checked_temperature(temperature), as_axes(axis_names)
    inner = optax.with_extra_args_support(momentum)

    def init_fn(params: optax.Params) -> BlendByLoraPidState:
        one_each = jnp.zeros(len(jax.tree.leaves(params)), jnp.float32)
        return BlendByLoraPidState(pid.init(one_each, xp=jnp), inner.init(params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        controls: Controls | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, BlendByLoraPidState]:
        weights = required(params, "blend_by_lora_pid")
        grads, treedef = jax.tree.flatten(updates)
        held = state.pid
        scales = [
            clipped(g, p, "tensor", held.agc[i], AGC_EPS, axes)
            for i, (g, p) in enumerate(zip(grads, weights, strict=True))
        ]
        scales = together(scales, list(map(jnp.asarray, grads)), axes)
        shortened = treedef.unflatten([g * s for g, s in zip(grads, scales, strict=True)])
        averages, inner_state = inner.update(
            shortened, state.inner_state, params, controls=controls, **extra_args
        )
        momenta = treedef.flatten_up_to(averages)
        weighed = [steered(held.blend[i], controls) for i in range(len(momenta))]
        directions = blend(momenta, weighed, temperature, axes)
        ok = jnp.ones((), jnp.bool_) if controls is None else controls.ok
        shares = [
            mean_over_shards(large_share(u, rms, xp=jnp) * float(u.size), u, axes)
            for u, rms in sized(directions, axes)
        ]
        seen = jnp.stack(shares) if shares else jnp.zeros_like(held.rho)
        new, _ = pid.step(held, seen, ok, xp=jnp)
        return treedef.unflatten(directions), BlendByLoraPidState(new, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
