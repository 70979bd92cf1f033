"""`axiom`: memory first. A factored second moment, no momentum or one of four bits."""

from collections.abc import Sequence

import chex
import optax

from cruxy_control.law import Law, needs_alignment
from cruxy_control.meta3 import Meta3
from cruxy_optax._actuators.clip import clip_by_predicted_norm
from cruxy_optax._actuators.factored import (
    limited_rms,
    momentum_of_directions,
    scale_by_factored_rms,
    scale_by_size,
)
from cruxy_optax._actuators.rate import scale_by_meta_learning_rate, throttle_by_phase
from cruxy_optax._optimizers.parts import Mask, decayed
from cruxy_optax._stabilize import stabilize


def axiom(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float | None = None,
    decay_rate: float = 0.8,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    momentum_bits: int = 4,
    power: chex.Numeric = 1.0,
    clip_rms: float | None = 1.0,
    relative_step: bool = False,
    streak_boost: float = 1.0,
    snr_floor: float = 0.0,
    min_dim_size_to_factor: int = 32,
    law: Law = Meta3(clip_threshold=None),
    bounds: tuple[float, float] | None = None,
    axis_names: str | Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    r"""Adafactor's second moment under the Meta3 controller: next to no state on matrices.

    A matrix of `n` rows and `m` columns keeps `n + m` numbers, 0.004 bytes a parameter at 2048 by
    2048. The direction is the gradient over the root of what they stand for:

    $$
    R_t = \beta_t R_{t-1} + (1 - \beta_t)\, \mathrm{mean}_j\, g_t^2, \quad
    C_t = \beta_t C_{t-1} + (1 - \beta_t)\, \mathrm{mean}_i\, g_t^2, \quad
    u_t = g_t \Big/ \sqrt{R_t C_t / \mathrm{mean}\, R_t}, \quad
    \beta_t = 1 - t^{-0.8}
    $$

    A tensor whose `u` has a root mean square above `clip_rms` is scaled down to it, so that the
    gradient's norm needs no clip: `law` has none by default. What is said at `meta3` of the
    throttle and the guard holds here too; `beta1` and `beta2` are not the law's.

    Without momentum each step is as noisy as its gradient: end with a small rate, or give `b1`. A
    momentum is an average of `u`, in four bits 0.51 bytes a parameter. Two options read it, since
    $\hat{m}^2$ is then the signal-to-noise ratio $m^2 / v$ of a coordinate: `streak_boost` and
    `snr_floor`. Both are off by default.

    Args:
        learning_rate: a constant of at least 0, or a schedule of the number of good steps.
        b1: decay of the momentum, in `(0, 1)`; `None` for none.
        decay_rate: the 0.8 in the decay of the second moment, in `(0, 1]`; smaller forgets faster.
        weight_decay: decoupled weight decay, at least 0, or a schedule; multiplied by the rate.
        mask: where weight decay applies; see `meta3`.
        momentum_bits: bits an element of the momentum, 4 or 8 (`quantize_state`), 16 or 32.
        power: of the root in `u`, in `[0, 1]`: `g / v^(power / 2)` (Padam). Below 1 the size of `u`
            is no longer about 1 but about `|g|^(1 - power)`: the rate is then one for gradients of
            this size, and `clip_rms` limits `u` from above alone. No measurement speaks for it.
        clip_rms: largest root mean square of a tensor's `u`, above 0; `None` for no limit.
        relative_step: multiplies each tensor's step by `max(rms(parameter), 1e-3)`, as Adafactor
            does. The rate is then a share of the parameter: about 1e-2.
        streak_boost: up to this factor, in `[1, 1.5]`, on coordinates whose sign has persisted.
        snr_floor: in `[0, 1)`. A row (the last axis) whose signal-to-noise ratio is below it is
            damped by `snr / snr_floor`; noise alone has 0.05 at `b1=0.9`.
        min_dim_size_to_factor: a tensor is factored over its two largest axes where both are at
            least this long; others keep a whole second moment.
        law: the controller with its constants.
        bounds: absolute bounds on the meta learning rate; see `scale_by_meta_learning_rate`.
        axis_names: axes of an enclosing `jax.shard_map` or `jax.pmap` over which parameters are
            copies, not split; see `stabilize`. Split ones belong under `jax.jit`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; see `meta3`. Its state is float32 or coded,
        whatever the parameters are.

    Raises:
        ValueError: where an argument is outside its range, or `streak_boost`, `snr_floor` or a
            law that steers by the first moment (`SelfDriving`) comes without `b1`.
        TypeError: where a parameter is complex or `law` is none.

    Examples:
        >>> import jax, jax.numpy as jnp, cruxy_optax
        >>> params = {"w": jnp.ones((512, 512)), "b": jnp.ones(512)}
        >>> tx = cruxy_optax.axiom(learning_rate=1e-2, weight_decay=0.0)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> jax.tree.map(lambda u: round(float(u.min()), 4), updates)
        {'b': -0.0075, 'w': -0.0075}
        >>> matrix = {"w": jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16)}
        >>> print(cruxy_optax.estimate_memory(matrix, tx).state)
        16805

    References:
        Shazeer and Stern, [Adafactor](https://arxiv.org/abs/1804.04235), 2018; Chen et al.,
        [Padam](https://arxiv.org/abs/1806.06763), 2018.
    """
    if b1 is None and needs_alignment(law):
        raise ValueError(
            "law must not steer by the first moment, of which axiom() keeps none without b1, got "
            f"{type(law).__name__}; give b1=0.9, or use Meta3(clip_threshold=None)."
        )
    return stabilize(
        optax.chain(
            clip_by_predicted_norm(),
            scale_by_factored_rms(decay_rate, min_dim_size_to_factor, power),
            *limited_rms(clip_rms),
            *momentum_of_directions(b1, momentum_bits, streak_boost, snr_floor),
            *([scale_by_size()] if relative_step else []),
            *decayed(weight_decay, mask, law),
            throttle_by_phase(),
            scale_by_meta_learning_rate(learning_rate, bounds=bounds),
        ),
        law=law,
        axis_names=axis_names,
    )
