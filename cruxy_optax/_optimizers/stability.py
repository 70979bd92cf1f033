"""`stability_v1` and `stability_v2`: the optimizer `meta3` under the two earlier laws.

Their arguments are `meta3`'s, name for name, and reach it as they came; the default law differs.
"""

from collections.abc import Sequence
from typing import Any

import chex
import optax

from cruxy_control.law import Law
from cruxy_control.stability_v1 import StabilityV1
from cruxy_control.stability_v2 import StabilityV2
from cruxy_optax._optimizers.meta3 import meta3
from cruxy_optax._optimizers.parts import Mask


def stability_v1(
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
    law: Law = StabilityV1(),
    bounds: tuple[float, float] | None = None,
    axis_names: str | Sequence[str] = (),
    state_bits: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW under the first Cruxy controller: two windows and a PD loop, no clipping.

    Where the squared gradient norm grows (`phi > 0.55`) the rate is `1 - 0.3 phi` of the one that
    was set, where it falls (`phi < 0.45`) `1 + 0.2 (1 - phi)`, between them just that (v2.0 9);
    `beta2` moves by up to 15 % with `u = tanh((kp e + kd de) / tau)` (v2.0 5-10); `beta1` stays.
    Steps whose gradient is not finite are skipped.

    Args:
        learning_rate: see `meta3`, as all that follow.
        b1: base of the first moment's decay.
        b2: base of the second moment's decay.
        eps: added to the root of the second moment.
        mu_dtype: dtype of the first moment.
        weight_decay: decoupled weight decay.
        mask: where weight decay applies.
        nesterov: looks one step ahead.
        centralize: gradient centralization.
        law: the controller with its constants.
        bounds: absolute bounds on the rate before the phase factor.
        axis_names: axes of an enclosing `jax.shard_map` or `jax.pmap`.
        state_bits: 32, 16, 8 or 4 bits for the moments.

    Returns:
        An `optax.GradientTransformationExtraArgs`; see `meta3`.

    Raises:
        ValueError: where an argument is outside its range, or both `state_bits` and `mu_dtype` are
            given.
        TypeError: where a parameter is complex or `law` is none.

    Examples:
        >>> import jax.numpy as jnp, cruxy_optax
        >>> tx = cruxy_optax.stability_v1(learning_rate=0.1, weight_decay=0.0)
        >>> params = jnp.array([1.0, 2.0])
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> print(updates.round(3))
        [-0.1 -0.1]
    """
    return meta3(**locals())


def stability_v2(
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
    law: Law = StabilityV2(),
    bounds: tuple[float, float] | None = None,
    axis_names: str | Sequence[str] = (),
    state_bits: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW under the second Cruxy controller: curvature, clipping, early warning.

    The rate is multiplied by a running factor that falls where the phase is above 0.55 and
    recovers below 0.5 (v2.0 27-29). It is bounded to `[1e-3, 1]`: this optimizer only ever
    brakes, and on a steady noisy gradient runs at the rate that was set, with `beta1` about 0.873
    and the gradient norm clipped at about 1.5. Steps whose gradient is not finite are skipped.

    Args:
        learning_rate: see `meta3`, as all that follow.
        b1: base of the first moment's decay.
        b2: base of the second moment's decay.
        eps: added to the root of the second moment.
        mu_dtype: dtype of the first moment.
        weight_decay: decoupled weight decay.
        mask: where weight decay applies.
        nesterov: looks one step ahead.
        centralize: gradient centralization.
        law: the controller with its constants.
        bounds: absolute bounds on the rate before the phase factor.
        axis_names: axes of an enclosing `jax.shard_map` or `jax.pmap`.
        state_bits: 32, 16, 8 or 4 bits for the moments.

    Returns:
        An `optax.GradientTransformationExtraArgs`; see `meta3`.

    Raises:
        ValueError: where an argument is outside its range, or both `state_bits` and `mu_dtype` are
            given.
        TypeError: where a parameter is complex or `law` is none.

    Examples:
        >>> import jax.numpy as jnp, cruxy_optax
        >>> tx = cruxy_optax.stability_v2(learning_rate=0.1, weight_decay=0.0)
        >>> params = jnp.array([1.0, 2.0])
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> print(updates.round(3))
        [-0.1 -0.1]
    """
    return meta3(**locals())
