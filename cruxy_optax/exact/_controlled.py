"""AdamW under a control law on exact scalars, with exact signals."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cruxy_control.controls import betas, meta_learning_rate
from cruxy_control.law import Law, check_law, needs_alignment
from cruxy_control.meta3 import Meta3
from cruxy_control.signals import NOT_KNOWN, Signals
from cruxy_exact import optimizers as core
from cruxy_exact.arithmetic import f32, mul
from cruxy_exact.scalars import Exact, Namespace, unwrapped, wrapped
from cruxy_optax.exact._frame import frame
from cruxy_optax.exact._gradients import settled
from cruxy_optax.exact._optimizers import Mask, adamw, leaf_by_leaf, zeros


class ControlledState(NamedTuple):
    """What `controlled` keeps."""

    law_state: Any  # the law's own NamedTuple of scalars and short vectors
    mu: optax.Updates  # first moments, like the parameters
    nu: optax.Updates  # second moments, like the parameters
    mu_decay: jax.Array  # product of the decay rates so far; shape=(), dtype=float32
    nu_decay: jax.Array  # likewise


def controlled(
    learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    mask: Mask = None,
    *,
    law: Law | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW under Meta3, with the bits of `cruxy_torch.exact.Controlled`, the same everywhere.

    The norms of the raw gradient are exact sums, the law runs on exact scalars, and the step has
    the clip, the rate and the decay rates that the law orders. A step whose gradient is not finite
    moves nothing.

    Args:
        learning_rate: that the law scales; at least 0.
        b1: decay rate of the first moment, in `[0, 1)`, which the law moves.
        b2: decay rate of the second, likewise.
        eps: added to the root of the second, at least 0.
        weight_decay: decoupled, at least 0.
        mask: where weight decay applies; see `adamw`.
        law: `Meta3()` where `None`; one that measures no alignment.

    Returns:
        An `optax.GradientTransformationExtraArgs` for `exact.apply_updates`. `update` takes the
        loss as `value=`, float32 `()` or a number; it is part of the bits. State: two moments, 8
        bytes a parameter, plus under 1 KB.

    Raises:
        ValueError: where an argument is outside its range, or the law measures the alignment of
            gradient and momentum, as `SelfDriving` does; from `update` without `params`.
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
    if needs_alignment(law):
        raise ValueError(
            "exact.controlled measures no alignment of gradient and momentum, which the law needs, "
            f"got {law!r}; use Meta3, StabilityV1 or StabilityV2."
        )
    exact_law = Exact(law)

    def init_fn(params: optax.Params) -> ControlledState:
        with frame():
            one = jnp.ones((), jnp.float32)
            law_state = exact_law.init(one * 0, xp=jnp)
            return ControlledState(law_state, zeros(params), zeros(params), one, one)

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
            leaves = [g for g in jax.tree.leaves(updates) if g.size]
            if not leaves:
                return updates, state
            like = jnp.zeros((), jnp.float32)
            signals = Signals(
                core.global_norm(leaves, xp=jnp),
                core.gamma_norm(leaves, law.gamma, xp=jnp),
                jnp.asarray(NOT_KNOWN if value is None else value, jnp.float32),
            )
            law_state, controls = exact_law.step(state.law_state, signals, xp=jnp)
            space, scalars = Namespace(jnp, like), wrapped(controls, jnp)
            rate = meta_learning_rate(scalars, f32(learning_rate), xp=space) * scalars.phase_scale
            decays = betas(scalars, f32(b1), f32(b2), xp=space)
            beta1, beta2, lr = unwrapped((*decays, rate))
            products = core.next_products((state.mu_decay, state.nu_decay), (beta1, beta2), xp=jnp)
            pairs = zip(core.adam_factors(*products, xp=jnp), products, strict=True)
            # Before the first step that counts nothing is to be corrected, and 1 / 0 would be.
            factors: Any = tuple(jnp.where(w < 1.0, k, jnp.ones_like(k)) for k, w in pairs)

            def one(p: Any, g: Any, decay: float, m: Any, v: Any) -> tuple[Any, ...]:
                g = mul(g, controls.clip_scale, xp=jnp)
                g = jnp.where(controls.ok, g, jnp.zeros_like(g))
                options = {"b1": beta1, "b2": beta2, "eps": eps}
                m, v, u = core.adam_direction(g, m, v, factors, **options, xp=jnp)
                return -core.change(p, u, lr=lr, weight_decay=decay, xp=jnp), m, v

            trees = state.mu, state.nu
            out, mu, nu = leaf_by_leaf(one, updates, params, weight_decay, mask, *trees)
        return out, ControlledState(law_state, mu, nu, *products)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
