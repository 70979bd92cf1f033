"""Adam's and Lion's ways from a gradient to a direction, with rates that the controller moves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cruxy_control.checks import check_range
from cruxy_control.controls import Controls, betas
from cruxy_control.formulas.moments import seen
from cruxy_optax._controls import materialize, require_controls
from cruxy_optax._tree import accumulator_dtype, root, where


class ScaleByControlledAdamState(NamedTuple):
    """Adam's moments and the normalisers of their moving decay rates."""

    mu: optax.Updates  # like the parameters; mu_dtype
    nu: optax.Updates  # like the parameters; float32 (float64 for float64)
    mu_decay: jax.Array  # product of all beta1 so far; shape=(), dtype=float32
    nu_decay: jax.Array  # product of all beta2 so far; shape=(), dtype=float32
    beta1: jax.Array  # this step's, 1 on a skipped step; shape=(), dtype=float32
    beta2: jax.Array  # this step's, 1 on a skipped step; shape=(), dtype=float32

    held_by_controls = True
    telemetry = ("beta1", "beta2")

    @property
    def first_moment(self) -> optax.Updates:
        """What a law that steers by the alignment compares the gradient with."""
        return self.mu


def scale_by_controlled_adam(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    mu_dtype: Any | None = None,
    *,
    nesterov: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's direction with this step's `beta1` and `beta2` from the controller.

    $$
    m_t = \beta_{1,t} m_{t-1} + (1 - \beta_{1,t}) g_t, \qquad
    v_t = \beta_{2,t} v_{t-1} + (1 - \beta_{2,t}) g_t^2, \qquad
    u_t = \hat{m}_t / (\sqrt{\hat{v}_t} + \varepsilon)
    $$

    Because the rates move, the moments are normalised by what they really weigh,
    $1 - \prod_s \beta_s$, and the Nesterov numerator $\beta_1 m_t + (1 - \beta_1) g_t$ by
    $1 - \beta_{1,t} \prod_s \beta_{1,s}$. Raising today's rate to the power `t` would weigh the
    past with a rate it never had.

    Args:
        b1: base of the first moment's decay, in `[0, 1)`; the controller multiplies it. 0 keeps no
            first moment.
        b2: base of the second moment's decay, in `[0, 1)`.
        eps: added to the root of the second moment, at least 0.
        mu_dtype: dtype of the first moment; `None` is the parameter's, but float32 for float16.
            The second moment is float32 (float64 for float64 parameters) always: one kept in half
            precision stops moving or overflows.
        nesterov: looks one step ahead, as `optax.nadam` does.

    Returns:
        An `optax.GradientTransformationExtraArgs`, for use inside `stabilize`.

    Raises:
        ValueError: where an argument is outside its range; from `update` outside `stabilize`.

    References:
        Kingma and Ba, [Adam](https://arxiv.org/abs/1412.6980), 2014; Dozat, Incorporating Nesterov
        Momentum into Adam, 2016.
    """
    b1, b2 = check_betas(b1, b2)
    eps = check_range("eps", eps, 0.0, remedy="1e-8 is a usual value")
    check_floating(mu_dtype)

    def init_fn(params: optax.Params) -> ScaleByControlledAdamState:
        one = jnp.ones((), jnp.float32)
        return ScaleByControlledAdamState(
            mu=first_moment_like(params, mu_dtype),
            nu=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=accumulator_dtype(p)), params),
            mu_decay=one,
            nu_decay=one,
            beta1=one,
            beta2=one,
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        controls: Controls | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByControlledAdamState]:
        del params, extra_args
        controls = require_controls(controls, "scale_by_controlled_adam")
        beta1, beta2 = betas(controls, b1, b2, xp=jnp)
        mu_decay, nu_decay = state.mu_decay * beta1, state.nu_decay * beta2
        numerator_decay = beta1 * mu_decay if nesterov else mu_decay
        beta1, beta2, rest1, rest2, mu_scale, nu_scale = materialize(
            beta1,
            beta2,
            1.0 - beta1,
            1.0 - beta2,
            1.0 / seen(numerator_decay, xp=jnp),
            1.0 / seen(nu_decay, xp=jnp),
        )

        grads = jax.tree.map(lambda g: masked(g, controls), updates)
        mu = jax.tree.map(lambda g, m: beta1 * m.astype(g.dtype) + rest1 * g, grads, state.mu)
        nu = jax.tree.map(lambda g, v: beta2 * v + rest2 * (g * g), grads, state.nu)
        ahead = jax.tree.map(lambda g, m: beta1 * m + rest1 * g, grads, mu) if nesterov else mu
        direction = jax.tree.map(
            lambda a, v: (a * mu_scale) / (root(v * nu_scale) + eps), ahead, nu
        )
        mu = jax.tree.map(lambda m, old: m.astype(old.dtype), mu, state.mu)
        return direction, ScaleByControlledAdamState(mu, nu, mu_decay, nu_decay, beta1, beta2)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def masked(g: jax.Array, controls: Controls) -> jax.Array:
    """The gradient in its accumulator's dtype; 0 on a skipped step, whatever stood before."""
    return where(controls.ok, g).astype(accumulator_dtype(g))


class ScaleByControlledLionState(NamedTuple):
    """Lion's one moment, whether its sign is taken or not."""

    mu: optax.Updates  # like the parameters; mu_dtype
    beta1: jax.Array  # this step's, 1 on a skipped step; shape=(), dtype=float32
    beta2: jax.Array  # this step's, 1 on a skipped step; shape=(), dtype=float32

    held_by_controls = True
    telemetry = ("beta1", "beta2")
    direction_kind = "lion"

    @property
    def first_moment(self) -> optax.Updates:
        """What a law that steers by the alignment compares the gradient with."""
        return self.mu


def scale_by_controlled_lion(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.99,
    mu_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion's sign direction with this step's `beta1` and `beta2` from the controller.

    $$
    u_t = \mathrm{sign}(\beta_{1,t} m_{t-1} + (1 - \beta_{1,t}) g_t), \qquad
    m_t = \beta_{2,t} m_{t-1} + (1 - \beta_{2,t}) g_t
    \qquad \text{(WP 11, 12)}
    $$

    The sign is taken of `b1 m_t + (b2 - b1) g_t`, which is the same number times `b2`.

    Args:
        b1: base of the rate inside the sign, in `[0, 1)`; the controller multiplies it.
        b2: base of the momentum's decay, in `(0, 1)`.
        mu_dtype: dtype of the momentum; `None` is the parameter's, but float32 for float16.
            bfloat16 halves the state.

    Returns:
        An `optax.GradientTransformationExtraArgs`, for use inside `stabilize`.

    Raises:
        ValueError: where an argument is outside its range; from `update` outside `stabilize`.

    References:
        Chen et al., [Symbolic Discovery of Optimization
        Algorithms](https://arxiv.org/abs/2302.06675), 2023.
    """
    return _lions_moment("scale_by_controlled_lion", b1, b2, mu_dtype, lambda c, _: jnp.sign(c))


def scale_by_controlled_momentum(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.99,
    mu_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion's momentum before its sign is taken, for `soften_sign` and `blend_sign` behind it.

    $$
    c_t = \beta_{1,t} m_{t-1} + (1 - \beta_{1,t}) g_t, \qquad
    m_t = \beta_{2,t} m_{t-1} + (1 - \beta_{2,t}) g_t
    $$

    Its size is that of the gradients: what comes next in the chain has to make it about 1.

    Args:
        b1: base of the rate in `c`, in `[0, 1)`; the controller multiplies it.
        b2: base of the momentum's decay, in `(0, 1)`.
        mu_dtype: dtype of the momentum; `None` is the parameter's, but float32 for float16.

    Returns:
        An `optax.GradientTransformationExtraArgs`, for use inside `stabilize`, with the state of
        `scale_by_controlled_lion`.

    Raises:
        ValueError: where an argument is outside its range; from `update` outside `stabilize`.

    Examples:
        >>> import jax.numpy as jnp, optax, cruxy_optax
        >>> tx = cruxy_optax.stabilize(
        ...     optax.chain(
        ...         cruxy_optax.scale_by_controlled_momentum(),
        ...         cruxy_optax.soften_sign(temperature=0.5),
        ...         cruxy_optax.scale_by_meta_learning_rate(0.01),
        ...     )
        ... )
        >>> params = jnp.array([1.0, -1.0])
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> print(updates)
        [-0.01  0.01]
    """

    def unscaled(c: jax.Array, beta2: jax.Array) -> jax.Array:
        return c / beta2

    return _lions_moment("scale_by_controlled_momentum", b1, b2, mu_dtype, unscaled)


def _lions_moment(
    name: str,
    b1: chex.Numeric,
    b2: chex.Numeric,
    mu_dtype: Any | None,
    direction_of: Callable[[jax.Array, jax.Array], jax.Array],
) -> optax.GradientTransformationExtraArgs:
    """Lion's moment, and what `direction_of(beta2 c, beta2)` makes of it; `name` is the user's."""
    b1, b2 = check_betas(b1, b2)
    check_floating(mu_dtype)
    check_range("b2", b2, 0.0, 1.0, lower_open=True, upper_open=True, remedy="use 0.99")

    def init_fn(params: optax.Params) -> ScaleByControlledLionState:
        one = jnp.ones((), jnp.float32)
        return ScaleByControlledLionState(first_moment_like(params, mu_dtype), one, one)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        controls: Controls | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByControlledLionState]:
        del params, extra_args
        controls = require_controls(controls, name)
        beta1, beta2 = betas(controls, b1, b2, xp=jnp)

        beta1, beta2, rest2, ahead = materialize(beta1, beta2, 1.0 - beta2, beta2 - beta1)

        grads = jax.tree.map(lambda g: masked(g, controls), updates)

        # beta2 (beta1 m + (1 - beta1) g) = beta1 m' + (beta2 - beta1) g: the sign of WP 11 without
        # the old momentum, which XLA would otherwise have to copy before it may be overwritten.
        mu = jax.tree.map(
            lambda g, m: (beta2 * m.astype(g.dtype) + rest2 * g).astype(m.dtype), grads, state.mu
        )
        direction = jax.tree.map(lambda g, m: direction_of(beta1 * m + ahead * g, beta2), grads, mu)
        return direction, ScaleByControlledLionState(mu, beta1, beta2)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_betas(b1: chex.Numeric, b2: chex.Numeric) -> tuple[Any, Any]:
    """The bases of both decay rates, or an error where one is outside `[0, 1)`."""
    return (
        check_range("b1", b1, 0.0, 1.0, upper_open=True, remedy="0.9 is a usual value"),
        check_range("b2", b2, 0.0, 1.0, upper_open=True, remedy="0.99 to 0.999 are usual values"),
    )


def check_floating(mu_dtype: Any | None) -> None:
    """Raises where the dtype of a moment is no floating one."""
    if mu_dtype is not None and not jnp.issubdtype(jnp.dtype(mu_dtype), jnp.floating):
        raise TypeError(
            f"mu_dtype must be a floating dtype, got {mu_dtype!r}; use jnp.float32, jnp.bfloat16, "
            "or None for the parameter's own."
        )


def first_moment_like(params: optax.Params, dtype: Any | None) -> optax.Updates:
    """A first moment of zeros; in the parameter's dtype, but float32 for float16, if `None`."""

    def zeros(p: Any) -> jax.Array:
        own = jnp.result_type(p)
        return jnp.zeros_like(p, dtype=dtype or (jnp.float32 if own == jnp.float16 else own))

    return jax.tree.map(zeros, params)
