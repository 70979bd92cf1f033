"""Steps by the size of what they move: trust ratios, adaptive gradient clipping, limits by rms."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cruxy_control.checks import check_range
from cruxy_control.formulas import trust as formulas
from cruxy_optax._actuators.slices import Layout, Part, mean_squares, norms, parts_of, spread
from cruxy_optax._distributed.axes import as_axes, together
from cruxy_optax._tree import as_floating, root


class ScaleByTrustRatioEmaState(NamedTuple):
    """The averages of the logarithms of ratios."""

    average: Any  # like the parameters, one a part; float32; None without `decay`
    decays: Any  # product of all decays so far; shape=(), dtype=float32; None without `decay`
    inner_state: optax.OptState  # of `direction`


def scale_by_trust_ratio_ema(
    cap: chex.Numeric = formulas.TRUST_CAP,
    decay: chex.Numeric | None = None,
    floor: chex.Numeric = formulas.TRUST_FLOOR,
    *,
    space: Literal["update", "momentum"] = "update",
    direction: optax.GradientTransformation | None = None,
    per: Literal["tensor", "row", "slice"] = "tensor",
    slices: Layout | None = None,
    axis_names: str | Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    r"""Makes the step of each tensor as long as the tensor itself: LARS' and LAMB's trust ratio.

    $$
    r = \min\left(\text{cap},
    \frac{\max(\lVert \theta \rVert, \text{floor} \sqrt{n})}{\lVert u \rVert}\right),
    \qquad r = 1 \text{ where } u = 0, \qquad
    \hat{r}_t = \exp\frac{\sum_s d^{t-s} \ln r_s}{\sum_s d^{t-s}}
    $$

    With `decay` the update is multiplied by the average $\hat{r}$ in log space, without it by $r$.
    A step of a rate $\eta$ then moves each tensor by the share $\eta$ of its size. Inside
    `stabilize` it stands before `scale_by_meta_learning_rate`; weight decay before it counts in
    $u$.

    `python -m benchmarks components` measures what it is worth. Where only the share is to be
    bounded, `scale_by_meta_learning_rate(relative_limit=)` and `limit_relative_step` do that and
    leave the rest alone.

    Args:
        cap: the largest ratio, above 0.
        decay: of the average, in `[0, 1)`; `None` for none.
        floor: a root mean square of a parameter counts as at least this, above 0: zeros, as in
            LoRA's B, could never move.
        space: where $u$ is measured: `"update"`, on what comes in; `"momentum"`, on what goes into
            `direction`, before a sign takes its size. The ratio multiplies what comes out. It is
            then one for gradients of this size unless a preconditioner comes before.
        direction: what makes a direction of a momentum, such as `blend_sign()`; given with
            `space="momentum"` and only then, since members of a chain see nothing of what came
            before.
        per: `"tensor"`; `"row"`, for every vector along the last axis; `"slice"`, for each slice
            of those tensors that `slices` has.
        slices: see `scale_by_slices`; given with `per="slice"` and only then.
        axis_names: axes of an enclosing `jax.shard_map` over which parameters may be split; for
            rows those along which the last axis is, for slices none along which theirs is.

    Returns:
        An `optax.GradientTransformationExtraArgs`. Its state is that of `direction` and, with
        `decay`, a float32 number a part.

    Raises:
        ValueError: where an argument is outside its range, or one comes without the other; from
            `init` and `update` where slices do not fit; from `update` without `params`.

    Examples:
        >>> import jax.numpy as jnp, cruxy_optax
        >>> tx = cruxy_optax.scale_by_trust_ratio_ema(cap=10.0)
        >>> params = {"w": jnp.full(4, 3.0), "lora_b": jnp.zeros(4)}
        >>> updates = {"w": jnp.full(4, 0.5), "lora_b": jnp.full(4, 0.5)}
        >>> updates, _ = tx.update(updates, tx.init(params), params)
        >>> print(updates["w"], updates["lora_b"])
        [3. 3. 3. 3.] [0.001 0.001 0.001 0.001]

    References:
        You et al., [Large Batch Training of Convolutional Networks](https://arxiv.org/abs/1708.03888)
        (LARS), 2017, and [Large Batch Optimization for Deep
        Learning](https://arxiv.org/abs/1904.00962) (LAMB), 2019.
    """
    cap = check_range("cap", cap, 0.0, math.inf, lower_open=True, remedy="10 is a usual value")
    floor = check_range("floor", floor, 0.0, lower_open=True, remedy="keep the default")
    if decay is not None:
        remedy = "0.9 averages over ten steps, None is no average"
        decay = check_range("decay", decay, 0.0, 1.0, upper_open=True, remedy=remedy)
    _check_one_of("space", space, ("update", "momentum"))
    _check_one_of("per", per, ("tensor", "row", "slice"))
    _check_together("space", space, "momentum", "direction", direction)
    _check_together("per", per, "slice", "slices", slices)
    inner = optax.with_extra_args_support(optax.identity() if direction is None else direction)
    axes = as_axes(axis_names)

    def init_fn(params: optax.Params) -> ScaleByTrustRatioEmaState:
        inner_state = inner.init(params)
        parts = parts_of(params, per, slices)
        if decay is None:
            return ScaleByTrustRatioEmaState(None, None, inner_state)
        leaves, treedef = jax.tree.flatten(params)
        zeros = [
            jnp.zeros_like(mean_squares(jnp.asarray(p), part))
            for p, part in zip(leaves, parts, strict=True)
        ]
        one = jnp.ones((), jnp.float32)
        return ScaleByTrustRatioEmaState(treedef.unflatten(zeros), one, inner_state)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByTrustRatioEmaState]:
        parts = parts_of(updates, per, slices)
        weights = required(params, "scale_by_trust_ratio_ema")
        before, treedef = jax.tree.flatten(updates)
        ratios = [ratio(p, u, part) for p, u, part in zip(weights, before, parts, strict=True)]
        ratios = together(ratios, list(map(jnp.asarray, before)), axes)
        average, decays = state.average, state.decays
        if decay is not None:
            decays = decays * decay
            pairs = zip(treedef.flatten_up_to(average), ratios, strict=True)
            logs = [formulas.log_average(a, r, decay, xp=jnp) for a, r in pairs]
            ratios = [formulas.averaged_ratio(a, decays, xp=jnp) for a in logs]
            average = treedef.unflatten(logs)
        after, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        scaled = _times(after, ratios, parts)
        return scaled, ScaleByTrustRatioEmaState(average, decays, inner_state)

    def ratio(p: Any, u: Any, part: Part) -> jax.Array:
        size, step = (root(mean_squares(jnp.asarray(x), part, axes)) for x in (p, u))
        return formulas.trust_ratio(size, step, cap, floor, xp=jnp)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def clip_by_parameter_norm(
    clip: chex.Numeric = 0.02,
    eps: chex.Numeric = formulas.AGC_EPS,
    *,
    per: Literal["tensor", "row"] = "tensor",
    axis_names: str | Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive gradient clipping (AGC): no gradient is longer than a share of its parameter.

    $$
    g \leftarrow g \, \min\left(1,
    \frac{c \max(\lVert \theta \rVert, \varepsilon)}{\lVert g \rVert}\right)
    $$

    It belongs before the moments: the length of a direction says nothing of how good the step is.
    `optax.adaptive_grad_clip` is the same by output units.

    Args:
        clip: $c$, above 0.
        eps: a parameter's norm counts as at least this, above 0.
        per: `"tensor"`, or `"row"`, for every vector along the last axis.
        axis_names: axes of an enclosing `jax.shard_map` over which parameters may be split; for
            rows those along which the last axis is.

    Returns:
        An `optax.GradientTransformationExtraArgs` without state.

    Raises:
        ValueError: where an argument is outside its range; from `update` without `params`.

    Examples:
        >>> import jax.numpy as jnp, cruxy_optax
        >>> tx = cruxy_optax.clip_by_parameter_norm(0.1, per="row")
        >>> params = jnp.array([[3.0, 4.0], [30.0, 40.0]])
        >>> print(tx.update(jnp.full((2, 2), 0.5), tx.init(params), params)[0].round(3))
        [[0.354 0.354]
         [0.5   0.5  ]]

    References:
        Brock et al., [High-Performance Large-Scale Image Recognition Without
        Normalization](https://arxiv.org/abs/2102.06171), 2021, equation 3.
    """
    clip = check_range("clip", clip, 0.0, lower_open=True, remedy="0.01 to 0.1 are usual values")
    eps = check_range("eps", eps, 0.0, lower_open=True, remedy="keep the default")
    _check_one_of("per", per, ("tensor", "row"))
    axes = as_axes(axis_names)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del extra_args
        weights = required(params, "clip_by_parameter_norm")
        leaves = [jnp.asarray(u) for u in jax.tree.leaves(updates)]
        scales = [clipped(g, p, per, clip, eps, axes) for g, p in zip(leaves, weights, strict=True)]
        scales = together(scales, leaves, axes)
        return _times(updates, scales, [per] * len(leaves)), state

    return optax.GradientTransformationExtraArgs(_no_state, update_fn)


def clipped(
    g: Any, p: Any, per: Part, clip: Any, eps: Any, axis_names: tuple[str, ...]
) -> jax.Array:
    """The factor of adaptive clipping on each part of a gradient."""
    g_norm, p_norm = (norms(jnp.asarray(x), per, axis_names) for x in (g, p))
    return formulas.agc_scale(g_norm, p_norm, clip, eps, xp=jnp)


def clip_by_rms(
    limit: chex.Numeric = 1.0,
    *,
    per: Literal["tensor", "row", "block"] = "tensor",
    axis_names: str | Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    r"""Scales a direction down where its root mean square is above a limit.

    $$
    u \leftarrow u \, \min(1, \text{limit} / \mathrm{rms}(u))
    $$

    It stands behind the direction and before the learning rate. For a tensor it is
    `optax.clip_by_block_rms`, whose blocks are tensors.

    Args:
        limit: above 0.
        per: `"tensor"`; `"row"`, for every vector along the last axis; `"block"`, for every 256
            elements along it, the last of which may be fewer; on a mesh of explicit axes that axis
            must not be split then.
        axis_names: axes of an enclosing `jax.shard_map` over which parameters may be split; for
            rows those along which the last axis is. Blocks are those of a shard.

    Returns:
        An `optax.GradientTransformationExtraArgs` without state.

    Raises:
        ValueError: where an argument is outside its range.

    Examples:
        >>> import jax.numpy as jnp, cruxy_optax
        >>> tx = cruxy_optax.clip_by_rms(1.0, per="row")
        >>> updates = jnp.array([[4.0, -4.0], [0.5, 0.5]])
        >>> print(tx.update(updates, tx.init(updates))[0])
        [[ 1.  -1. ]
         [ 0.5  0.5]]

    References:
        Shazeer and Stern, [Adafactor](https://arxiv.org/abs/1804.04235), 2018, section 6.
    """
    limit = check_range("limit", limit, 0.0, lower_open=True, remedy="1 is Adafactor's")
    _check_one_of("per", per, ("tensor", "row", "block"))
    axes = as_axes(axis_names)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params, extra_args
        leaves = [jnp.asarray(u) for u in jax.tree.leaves(updates)]
        sizes = [root(mean_squares(u, per, axes)) for u in leaves]
        scales = [formulas.rms_clip_scale(rms, limit, xp=jnp) for rms in sizes]
        scales = together(scales, leaves, axes)
        return _times(updates, scales, [per] * len(leaves)), state

    return optax.GradientTransformationExtraArgs(_no_state, update_fn)


def _no_state(params: optax.Params) -> optax.EmptyState:
    del params
    return optax.EmptyState()


def _times(updates: optax.Updates, factors: Sequence[jax.Array], parts: Sequence[Part]) -> Any:
    """Every leaf times the factors of its parts, in its own dtype."""
    leaves, treedef = jax.tree.flatten(updates)
    scaled = [
        as_floating(u * spread(factor, jnp.asarray(u), part), u)
        for u, factor, part in zip(leaves, factors, parts, strict=True)
    ]
    return treedef.unflatten(scaled)


def required(params: optax.Params | None, name: str) -> list[Any]:
    """The leaves of the parameters, which have to be given."""
    if params is None:
        raise ValueError(
            f"{name}() measures the parameters, but got params=None; call "
            "update(grads, state, params)."
        )
    return jax.tree.leaves(params)


def _check_one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {known}, got {value!r}; give one of them.")


def _check_together(name: str, value: str, wanted: str, other: str, given: Any) -> None:
    """Raises where a choice needs another argument that is not given, or the reverse."""
    if (value == wanted) != (given is not None):
        raise ValueError(
            f"{name}={wanted!r} and {other} come together, got {name}={value!r} with "
            f"{other}={given!r}; give both or leave both out."
        )
