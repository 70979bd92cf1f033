"""`round_updates`: half-precision parameters that still learn."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cruxy_exact.random_bits import random_bits, round_to_bfloat16, stream_key
from cruxy_optax._controls import any_step_taken
from cruxy_optax._places import WHOLE, element_numbers

METHODS = ("stochastic", "kahan")


class RoundUpdatesState(NamedTuple):
    """The counter of the rounding, what rounding has cut off, and the wrapped state."""

    count: jax.Array  # steps so far, wrapping; shape=(), dtype=int32
    compensation: Any  # like the parameters where "kahan", else None
    inner_state: optax.OptState

    casts_updates = True


def round_updates(
    inner: optax.GradientTransformation, method: str = "stochastic", *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Lets any optimizer move parameters in bfloat16 by less than half of their last bit.

    Near 1 a bfloat16 has steps of $2^{-7}$ above and $2^{-8}$ below: rounded to the nearest, an
    update of $10^{-3}$ changes nothing, for ever. Here the wrapped optimizer works in float32, on
    parameters and gradients cast to it, and what it asks for is rounded

    - `"stochastic"`: up or down with the probability that makes the mean $p + u$. No memory.
    - `"kahan"`: to the nearest, and what was cut off is added to the next step's update: one
      buffer like the parameters, 2 bytes each.

    The update is the rounded parameter less the old one, in float32: `optax.apply_updates`, which
    adds in float32 and casts, lands exactly on what was rounded to. Leaves that are not bfloat16
    (`"kahan"`: nor float16) get the wrapped optimizer's own update in their dtype.

    Random bits are a function of the counter in the state, the seed, the leaf and the element, so a
    run is reproducible. A step that a `stabilize` around it or inside it skips changes nothing.

    Args:
        inner: the whole optimizer, with its learning rate: what it returns is added to parameters.
            Its state is that of float32 parameters; `quantize_state` makes it smaller.
        method: `"stochastic"` or `"kahan"`.
        seed: of the random bits; any whole number.

    Returns:
        An `optax.GradientTransformationExtraArgs`, the outermost one but for `stabilize`, which
        leaves such updates in float32. `update` needs `params`.

    Raises:
        ValueError: where `method` is neither; from `update` where `params` is left out.
        TypeError: where `inner` is no gradient transformation.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from cruxy_optax import round_updates
        >>> def train(tx):
        ...     params = jnp.ones(1000, jnp.bfloat16)
        ...     def step(carry, _):
        ...         params, state = carry
        ...         updates, state = tx.update(jnp.ones_like(params), state, params)
        ...         return (optax.apply_updates(params, updates), state), None
        ...     (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=100)
        ...     return params.astype(jnp.float32).mean().round(2)
        >>> print(train(optax.adam(1e-3)), train(round_updates(optax.adam(1e-3))))
        1.0 0.9

    References:
        Zamirai et al., [Revisiting BFloat16 Training](https://arxiv.org/abs/2010.06192), 2020.
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"inner must be a gradient transformation, got {inner!r}; give meta3(1e-3), "
            "optax.adamw(1e-3) or the like."
        )
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}; use 'stochastic'.")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> RoundUpdatesState:
        compensation = None
        if method == "kahan":
            compensation = jax.tree.map(
                lambda p: jnp.zeros_like(p) if _is_half(p) else None, params
            )
        count = jnp.zeros((), jnp.int32)
        return RoundUpdatesState(count, compensation, inner.init(_wide(params)))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RoundUpdatesState]:
        if params is None:
            raise ValueError(
                "round_updates() rounds the parameters themselves, but got params=None; call "
                "tx.update(grads, opt_state, params)."
            )
        updates, inner_state = inner.update(
            _wide(updates), state.inner_state, _wide(params), **extra_args
        )
        ok = any_step_taken(inner_state)
        leaves, treedef = jax.tree.flatten(params)
        asked = treedef.flatten_up_to(updates)
        if method == "kahan":
            kept = treedef.flatten_up_to(state.compensation)
            pairs = [_kahan(p, u, c, ok) for p, u, c in zip(leaves, asked, kept, strict=True)]
            compensation = treedef.unflatten([c for _, c in pairs])
            rounded = [u for u, _ in pairs]
        else:
            compensation, place = None, extra_args.get("place", WHOLE)
            count = jnp.asarray(state.count)
            rounded = [
                # Numbers of their own, apart from those of the codes of a state.
                _stochastic(p, u, stream_key(count, seed, -1 - n, xp=jnp), place.layer)
                for n, (p, u) in enumerate(zip(leaves, asked, strict=True), place.leaf)
            ]
        count = state.count + jnp.asarray(ok, jnp.int32)
        return treedef.unflatten(rounded), RoundUpdatesState(count, compensation, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_half(p: Any) -> bool:
    return jnp.result_type(p) in (jnp.bfloat16, jnp.float16)


def _wide(tree: Any) -> Any:
    """The tree with half-precision leaves in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if _is_half(x) else x, tree)


def _stochastic(p: Any, u: Any, key: jax.Array, layer: jax.Array | int) -> jax.Array:
    if jnp.result_type(p) != jnp.bfloat16:
        return u.astype(jnp.result_type(p))
    wide, bits = p.astype(jnp.float32), random_bits(key, element_numbers(jnp.shape(p), layer))
    return round_to_bfloat16(wide + u, bits, xp=jnp) - wide


def _kahan(p: Any, u: Any, compensation: Any, ok: Any) -> tuple[jax.Array, Any]:
    if compensation is None:
        return u.astype(jnp.result_type(p)), None
    wide = p.astype(jnp.float32)
    wanted = wide + (u + compensation.astype(jnp.float32))
    nearest = jnp.where(ok, wanted.astype(p.dtype), p).astype(jnp.float32)
    left = jnp.where(ok, wanted - nearest, compensation).astype(p.dtype)
    return nearest - wide, left
