"""Exact AdamW, Lion and SGD as optax transformations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cruxy_control.checks import check_range
from cruxy_exact import optimizers as core
from cruxy_exact.arithmetic import mul
from cruxy_optax.exact._frame import frame
from cruxy_optax.exact._gradients import settled
from cruxy_optax.exact._pairs import as_float32

Mask = Any | Callable[[optax.Params], Any] | None
"""Where weight decay applies: a tree of booleans, a function that makes one, or everywhere."""


class AdamWState(NamedTuple):
    """What `adamw` keeps."""

    count: jax.Array  # steps so far; shape=(), dtype=int32
    mu: optax.Updates  # first moments, like the parameters
    nu: optax.Updates  # second moments, like the parameters
    mu_decay: jax.Array  # product of the decay rates so far; shape=(), dtype=float32
    nu_decay: jax.Array  # likewise


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    mask: Mask = None,
) -> optax.GradientTransformation:
    r"""AdamW with the same bits everywhere, and those of `cruxy_torch.exact.AdamW`.

    $$
    m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
    v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
    \theta_t = \theta_{t-1} - \eta \Big(\frac{\hat{m}_t}{\sqrt{\hat{v}_t} + \varepsilon}
    + \lambda \theta_{t-1}\Big)
    $$

    Args:
        learning_rate: a number of at least 0, or a schedule of `exact` (`warmup_cosine`,
            `warmup_stable_decay`). Another schedule has the bits that its own arithmetic has.
        b1: decay rate of the first moment, in `[0, 1)`.
        b2: decay rate of the second, in `[0, 1)`.
        eps: added to the root of the second, at least 0.
        weight_decay: decoupled, at least 0.
        mask: tree of booleans like the parameters, or a function that makes one, `True` where
            weight decay applies.

    Returns:
        An `optax.GradientTransformation` for `exact.apply_updates`. State: two moments, 8 bytes a
        parameter.

    Raises:
        ValueError: where an argument is outside its range; from `update` without `params`.
        TypeError: from `update` where an array is not float32.

    Examples:
        >>> import jax.numpy as jnp
        >>> from cruxy_optax import exact
        >>> tx, params = exact.adamw(0.1), {"w": jnp.ones(2)}
        >>> updates, state = tx.update({"w": jnp.full(2, 0.5)}, tx.init(params), params)
        >>> print(exact.apply_updates(params, updates)["w"])
        [0.89900064 0.89900064]

    References:
        Loshchilov and Hutter, [Decoupled Weight Decay
        Regularization](https://arxiv.org/abs/1711.05101), 2019.
    """
    rate = rate_of(learning_rate)
    b1, b2 = _beta("b1", b1), _beta("b2", b2)
    eps = check_range("eps", eps, 0.0, remedy="1e-8 is a usual value")
    weight_decay = _decay(weight_decay)

    def init_fn(params: optax.Params) -> AdamWState:
        one = jnp.ones((), jnp.float32)
        return AdamWState(jnp.zeros((), jnp.int32), zeros(params), zeros(params), one, one)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AdamWState]:
        with frame():
            decays = state.mu_decay, state.nu_decay
            decays = core.next_products(decays, (b1, b2), xp=jnp)
            factors = core.adam_factors(*decays, xp=jnp)
            lr = rate(state.count)

            def one(p: Any, g: Any, decay: float, m: Any, v: Any) -> tuple[Any, ...]:
                options: Any = {"b1": b1, "b2": b2, "eps": eps}
                m, v, u = core.adam_direction(g, m, v, factors, **options, xp=jnp)
                return -core.change(p, u, lr=lr, weight_decay=decay, xp=jnp), m, v

            trees = state.mu, state.nu
            out, mu, nu = leaf_by_leaf(one, updates, params, weight_decay, mask, *trees)
        return out, AdamWState(_next(state.count), mu, nu, *decays)

    return optax.GradientTransformation(init_fn, update_fn)


class LionState(NamedTuple):
    """What `lion` keeps."""

    count: jax.Array  # steps so far; shape=(), dtype=int32
    mu: optax.Updates  # the moment, like the parameters


def lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformation:
    r"""Lion with the same bits everywhere, and those of `cruxy_torch.exact.Lion`.

    $$
    \theta_t = \theta_{t-1} - \eta \big(\mathrm{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t)
    + \lambda \theta_{t-1}\big), \qquad
    m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t
    $$

    Args:
        learning_rate: see `adamw`.
        b1: decay rate inside the sign, in `[0, 1)`.
        b2: decay rate of the moment, in `[0, 1)`.
        weight_decay: decoupled, at least 0.
        mask: see `adamw`.

    Returns:
        An `optax.GradientTransformation` for `exact.apply_updates`. State: one moment, 4 bytes a
        parameter.

    Raises:
        ValueError: where an argument is outside its range; from `update` without `params`.
        TypeError: from `update` where an array is not float32.

    References:
        Chen et al., [Symbolic Discovery of Optimization
        Algorithms](https://arxiv.org/abs/2302.06675), 2023.
    """
    rate, b1, b2 = rate_of(learning_rate), _beta("b1", b1), _beta("b2", b2)
    weight_decay = _decay(weight_decay)

    def init_fn(params: optax.Params) -> LionState:
        return LionState(jnp.zeros((), jnp.int32), zeros(params))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, LionState]:
        with frame():
            lr = rate(state.count)

            def one(p: Any, g: Any, decay: float, m: Any) -> tuple[Any, ...]:
                m, u = core.lion_direction(g, m, b1=b1, b2=b2, xp=jnp)
                return -core.change(p, u, lr=lr, weight_decay=decay, xp=jnp), m

            out, mu = leaf_by_leaf(one, updates, params, weight_decay, mask, state.mu)
        return out, LionState(_next(state.count), mu)

    return optax.GradientTransformation(init_fn, update_fn)


class SGDState(NamedTuple):
    """What `sgd` keeps."""

    count: jax.Array  # steps so far; shape=(), dtype=int32
    trace: Any  # the momentum, like the parameters; None without


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = None,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformation:
    """SGD with the same bits everywhere, and those of `cruxy_torch.exact.SGD`.

    Args:
        learning_rate: see `adamw`.
        momentum: its decay, in `[0, 1)`; `None` or 0 for none.
        nesterov: looks one step of the momentum ahead.
        weight_decay: times the parameter is added to the gradient; at least 0.
        mask: see `adamw`.

    Returns:
        An `optax.GradientTransformation` for `exact.apply_updates`. State: 4 bytes a parameter with
        momentum, else none.

    Raises:
        ValueError: where an argument is outside its range, or `nesterov` has no momentum; from
            `update` without `params`.
        TypeError: from `update` where an array is not float32.
    """
    rate, decay = rate_of(learning_rate), _beta("momentum", momentum or 0.0)
    weight_decay = _decay(weight_decay)
    if nesterov and not decay:
        raise ValueError(f"nesterov needs a momentum above 0, got {momentum!r}; use momentum=0.9.")

    def init_fn(params: optax.Params) -> SGDState:
        return SGDState(jnp.zeros((), jnp.int32), zeros(params) if decay else None)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, SGDState]:
        with frame():
            lr = rate(state.count)

            def one(p: Any, g: Any, share: float, *m: Any) -> tuple[Any, ...]:
                options = {"momentum": decay, "nesterov": nesterov, "weight_decay": share}
                new, u = core.sgd_direction(p, g, *(m or (None,)), **options, xp=jnp)
                return (-mul(u, core.rounded(lr), xp=jnp), *([new] if m else []))

            trees = [] if state.trace is None else [state.trace]
            out, *trace = leaf_by_leaf(one, updates, params, weight_decay, mask, *trees)
        return out, SGDState(_next(state.count), trace[0] if trace else None)

    return optax.GradientTransformation(init_fn, update_fn)


def leaf_by_leaf(
    one: Callable[..., tuple[Any, ...]],
    updates: optax.Updates,
    params: optax.Params | None,
    weight_decay: float,
    mask: Mask,
    *trees: Any,
) -> tuple[Any, ...]:
    """`one(p, g, weight decay, ...)` of every leaf, its results as trees."""
    decays, treedef = decays_of(params, weight_decay, mask)
    columns = [jax.tree.leaves(settled(params)), treedef.flatten_up_to(settled(updates)), decays]
    columns += [treedef.flatten_up_to(tree) for tree in trees]
    rows = [one(*row) for row in zip(*columns, strict=True)]
    if not rows:
        return (updates, *trees)
    return tuple(treedef.unflatten(column) for column in zip(*rows, strict=True))


def decays_of(
    params: optax.Params | None, weight_decay: float, mask: Mask
) -> tuple[list[float], Any]:
    """The weight decay of every leaf, and the structure of the tree."""
    if params is None:
        raise ValueError("exact optimizers need params; call update(grads, state, params).")
    treedef = jax.tree.structure(params)
    decays = [weight_decay] * treedef.num_leaves
    if mask is not None:
        chosen = mask(params) if callable(mask) else mask
        leaves = jax.tree.leaves(
            jax.tree.map(lambda m, p: jax.tree.map(lambda _: m, p), chosen, params)
        )
        decays = [weight_decay if m else 0.0 for m in leaves]
    return decays, treedef


def zeros(params: optax.Params) -> Any:
    """float32 zeros like the parameters, which have to be float32."""
    return jax.tree.map(lambda p: jnp.zeros_like(as_float32(p)), params)


def rate_of(learning_rate: optax.ScalarOrSchedule) -> Callable[[Any], Any]:
    """A function of the count, to a float32 array or a Python number."""
    if callable(learning_rate):
        return lambda count: jnp.asarray(learning_rate(count), jnp.float32)
    remedy = "use about 1e-3 for AdamW, 1e-4 for Lion, or a schedule"
    checked = check_range("learning_rate", learning_rate, 0.0, remedy=remedy)
    return lambda count: checked


def _beta(name: str, value: float) -> float:
    return check_range(name, value, 0.0, 1.0, upper_open=True, remedy="0.9 is a usual value")


def _decay(value: float) -> float:
    return check_range("weight_decay", value, 0.0, remedy="0 switches it off")


def _next(count: jax.Array) -> jax.Array:
    return jnp.asarray(optax.safe_increment(count))
