"""`meta3` and `meta_lion`: Adam and Lion under the Meta3 law, chains that read like the paper."""

from collections.abc import Sequence
from typing import Any

import chex
import optax

from cruxy_control.law import Law
from cruxy_control.meta3 import Meta3
from cruxy_optax._actuators.clip import clip_by_predicted_norm
from cruxy_optax._actuators.moments import scale_by_controlled_adam, scale_by_controlled_lion
from cruxy_optax._actuators.rate import scale_by_meta_learning_rate, throttle_by_phase
from cruxy_optax._actuators.voted import scale_by_voted_lion
from cruxy_optax._memory.quantize import in_bits
from cruxy_optax._optimizers.parts import Mask, centralized, decayed
from cruxy_optax._stabilize import stabilize


def meta3(
    learning_rate: optax.ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    mu_dtype: Any | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = True,
    centralize: bool = False,
    law: Law = Meta3(),
    bounds: tuple[float, float] | None = None,
    axis_names: str | Sequence[str] = (),
    state_bits: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW under the Meta3 controller, called like `optax.adamw`.

    **What it does differently from AdamW.** On a steady gradient it runs at 0.75 of the rate that
    was set (the phase throttle), `beta1` is about 0.873 where `b1` is 0.9, `beta2` is at its lower
    bound 0.9 whatever `b2` is, and the gradient norm is clipped at about 1.5. Momentum is
    Nesterov's. Steps whose gradient is not finite are skipped. Each can be switched off:
    `law=Meta3(phase_strength=0)`, `Meta3(beta1_gain=0)`, `Meta3(beta2_phase_strength=0)`,
    `Meta3(clip_threshold=None)`, `nesterov=False`.

    A slow loop, every ten steps, moves the rate and `beta2` by how far the gradient norm is from
    its mean over the last fifty steps; a fast loop, every step, throttles both by the phase:

    $$
    \begin{aligned}
    \sigma_t &= \Big(\sum |g_t|^{1.5}\Big)^{1/1.5}, \quad
    \varphi_t = v^{fast}_t / (v^{fast}_t + v^{slow}_t) && \text{(WP 1, 2, 3, 6)} \\
    \eta &\leftarrow \eta \, e^{-0.05 \tanh z}, \quad
    \beta_2 \leftarrow \beta_2 + 0.03 \tanh(z) (1 - \beta_2), \quad
    z = (v^{fast} - v^{ref}) / v^{ref} && \text{(WP 8, 9, 10)} \\
    \theta_{t+1} &= \theta_t - \eta (1 - 0.5 \varphi_t) (u_t + \lambda \theta_t)
    && \text{(WP 7, 13)}
    \end{aligned}
    $$

    Args:
        learning_rate: a constant of at least 0, or a schedule of the number of good steps.
        b1: base of the first moment's decay, in `[0, 1)`.
        b2: base of the second moment's decay, in `[0, 1)`.
        eps: added to the root of the second moment, at least 0.
        mu_dtype: dtype of the first moment; `None` is the parameter's, but float32 for float16.
        weight_decay: decoupled weight decay, at least 0, or a schedule of the number of good steps;
            multiplied by the rate, as in `optax.adamw`.
        mask: tree of booleans like (or a prefix of) the parameters, or a function that makes one,
            `True` where weight decay applies.
        nesterov: looks one step ahead, as `optax.nadamw` does.
        centralize: subtracts from each weight matrix's gradient its mean over the input axes
            (`centralize_kernels`), after measuring and clipping.
        law: the controller with its constants.
        bounds: absolute bounds on the meta learning rate; see `scale_by_meta_learning_rate`.
        axis_names: axes of an enclosing `jax.shard_map` or `jax.pmap`; see `stabilize`.
        state_bits: 32 or 16 for a first moment in float32 or bfloat16; 8 or 4 for both moments in
            low-bit codes (`quantize_state`); `None` for what `mu_dtype` says.

    Returns:
        An `optax.GradientTransformationExtraArgs`. `update` takes the loss as `value=`; left out,
        the curvature stays 0 and all else works. State: two moments, 8 bytes a float32 parameter,
        plus under 1 KB; 6 bytes with `state_bits=16`, 2.02 with 8 and 1.02 with 4.

    Raises:
        ValueError: where an argument is outside its range, or both `state_bits` and `mu_dtype` are
            given; from `update` where weight decay finds no `params`.
        TypeError: where a parameter is complex or `law` is none.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, cruxy_optax
        >>> def loss_fn(x): return jnp.sum(x**2)
        >>> tx = cruxy_optax.meta3(learning_rate=0.003)
        >>> params = jnp.array([1.0, 2.0, 3.0])
        >>> opt_state = tx.init(params)
        >>> for _ in range(3):
        ...     loss, grads = jax.value_and_grad(loss_fn)(params)
        ...     updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        ...     params = optax.apply_updates(params, updates)
        ...     print(f"{loss:.3f}")
        14.000
        13.973
        13.946

    References:
        Cruxy Stability Engine White Paper v2.1 (WP); Loshchilov and Hutter, [Decoupled Weight Decay
        Regularization](https://arxiv.org/abs/1711.05101), 2019.
    """
    return stabilize(
        optax.chain(
            clip_by_predicted_norm(),
            *centralized(centralize),
            in_bits(
                state_bits,
                mu_dtype,
                lambda mu_dtype: scale_by_controlled_adam(b1, b2, eps, mu_dtype, nesterov=nesterov),
            ),
            *decayed(weight_decay, mask, law),
            throttle_by_phase(),
            scale_by_meta_learning_rate(learning_rate, bounds=bounds),
        ),
        law=law,
        axis_names=axis_names,
    )


def meta_lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.99,
    mu_dtype: Any | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Mask = None,
    *,
    centralize: bool = False,
    law: Law = Meta3(),
    bounds: tuple[float, float] | None = None,
    axis_names: str | Sequence[str] = (),
    state_bits: int | None = None,
    vote: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion under the Meta3 controller, called like `optax.lion`: one moment instead of two.

    **What it does differently from Lion.** On a steady gradient it runs at 0.75 of the rate that
    was set, with `beta1` about 0.873 and `beta2` at its lower bound 0.9, and steps whose gradient
    is not finite are skipped. The clip changes only how much a step weighs in the momentum: the
    update is a sign. What switches each off stands at `meta3`.

    $$
    u_t = \mathrm{sign}(\beta_1 m_{t-1} + (1-\beta_1) g_t), \quad
    m_t = \beta_2 m_{t-1} + (1-\beta_2) g_t, \quad
    \theta_{t+1} = \theta_t - \eta (1 - 0.5 \varphi_t) (u_t + \lambda \theta_t)
    \qquad \text{(WP 11, 12, 13)}
    $$

    A sign has size 1: take about a third to a tenth of Adam's rate, and a weight decay as much
    larger.

    Args:
        learning_rate: a constant of at least 0, or a schedule of the number of good steps.
        b1: base of the rate inside the sign, in `[0, 1)`.
        b2: base of the momentum's decay, in `(0, 1)`.
        mu_dtype: dtype of the momentum; bfloat16 halves the state to 2 bytes a parameter.
        weight_decay: decoupled weight decay, multiplied by the rate; at least 0.
        mask: where weight decay applies; see `meta3`.
        centralize: gradient centralization; see `meta3`.
        law: the controller with its constants.
        bounds: absolute bounds on the meta learning rate; see `scale_by_meta_learning_rate`.
        axis_names: axes of an enclosing `jax.shard_map` or `jax.pmap`; see `stabilize`.
        state_bits: bits an element of the momentum, 32, 16, 8 or 4; see `meta3`.
        vote: axis of an enclosing `jax.shard_map` along which devices vote on the sign, each from
            gradients and a momentum of its own, which nobody averages: a bit an element on the wire
            (`scale_by_voted_lion`; its state lies on the mesh as `vote_specs` says). The law sees
            the mean over devices of loss and sums of squares. `None` for no vote.

    Returns:
        An `optax.GradientTransformationExtraArgs`; see `meta3`. State: 4 bytes a float32 parameter,
        plus under 1 KB; 2 bytes with `state_bits=16`, 1.01 with 8 and 0.51 with 4.

    Raises:
        ValueError: where an argument is outside its range, both `state_bits` and `mu_dtype` are
            given, or a vote and 8 or 4 of `state_bits`; from `update` where weight decay finds no
            `params`.
        TypeError: where a parameter is complex or `law` is none.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, cruxy_optax
        >>> def loss_fn(x): return jnp.sum(x**2)
        >>> tx = cruxy_optax.meta_lion(learning_rate=0.01, weight_decay=0.0)
        >>> params = jnp.array([1.0, 2.0, 3.0])
        >>> opt_state = tx.init(params)
        >>> loss, grads = jax.value_and_grad(loss_fn)(params)
        >>> updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        >>> print(updates)
        [-0.0075 -0.0075 -0.0075]

    References:
        Cruxy Stability Engine White Paper v2.1 (WP); Chen et al., [Symbolic Discovery of
        Optimization Algorithms](https://arxiv.org/abs/2302.06675), 2023.
    """
    if vote is not None and state_bits in (8, 4):
        raise ValueError(
            f"state_bits must be 32 or 16 where devices vote, got {state_bits}: each has a "
            "momentum of its own, in an axis that codes do not know; use 16."
        )

    def direction(mu_dtype: Any | None) -> optax.GradientTransformationExtraArgs:
        if vote is None:
            return scale_by_controlled_lion(b1, b2, mu_dtype)
        return scale_by_voted_lion(vote, b1, b2, mu_dtype)

    return stabilize(
        optax.chain(
            clip_by_predicted_norm(),
            *centralized(centralize),
            in_bits(state_bits, mu_dtype, direction),
            *decayed(weight_decay, mask, law),
            throttle_by_phase(),
            scale_by_meta_learning_rate(learning_rate, bounds=bounds),
        ),
        law=law,
        axis_names=axis_names,
        replica_axes=() if vote is None else vote,
    )
