"""`scale_by_role`: learning rates by role, in any chain of optax."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import optax

from cruxy_control.checks import check_range
from cruxy_control.roles import Rule, check_keys, check_rules, matching
from cruxy_optax._roles.parameters import labelled
from cruxy_optax._tree import as_floating


def scale_by_role(
    rates: Mapping[str, Any], *, rules: Iterable[Rule] = (), model: Any = None
) -> optax.GradientTransformation:
    r"""Multiplies each update by the rate of its role: learning rates by role in any chain.

    Stands behind what makes the update, `optax.chain(optax.adamw(1e-3), scale_by_role(...))`,
    and there scales decoupled weight decay with it. Inside `stabilize` it stands before
    `scale_by_meta_learning_rate`, whose `relative_limit` then bounds a step times the rate of the
    role. Everything else stays as it is, to the bit; without a rate nothing changes.

    Roles are those of the parameters, where `update` is given them, and else those of the updates,
    among which one that is missing (`None`) tells nothing of what stands beside it. Both are looked
    at as they come: inside `jax.shard_map` as parts, of which a row of a matrix, `(1, 4)`, is a
    vector. There rules tell, or scale outside of it.

    Args:
        rates: a factor of at least 0 by role or beginning of one, a number or a scalar array; the
            longest key wins, and what has none is 1. `{"lora.b": 16}` is LoRA+.
        rules: see `label_roles`.
        model: likewise.

    Returns:
        An `optax.GradientTransformation` without state, that can do without parameters.

    Raises:
        ValueError: where a rate is below 0; from `init` and `update` where a key is no role (the
            message lists those that the parameters have), and as in `label_roles`.
        TypeError: where `rates` is no mapping of numbers.

    Examples:
        >>> import jax.numpy as jnp, optax, cruxy_optax
        >>> params = {"wte": {"embedding": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}
        >>> tx = optax.chain(
        ...     optax.sgd(0.5), cruxy_optax.scale_by_role({"embedding": 0.5, "norm": 3.0})
        ... )
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> print(updates["wte"], updates["norm"], sep="\n")
        {'embedding': Array([-0.25, -0.25], dtype=float32)}
        {'scale': Array([-1.5, -1.5], dtype=float32)}

    References:
        Hayou et al., [LoRA+: Efficient Low Rank Adaptation of Large
        Models](https://arxiv.org/abs/2402.12354), 2024, for `{"lora.b": 16}`.
    """
    if not isinstance(rates, Mapping):
        raise TypeError(
            f"rates must be a mapping of roles to numbers, got {rates!r}; for instance "
            '{"embedding": 1 / 3, "norm": 3}.'
        )
    remedy = "1 changes nothing, 0 keeps such parameters where they are"
    table = {
        role: check_range(f"rates[{role!r}]", rate, 0.0, remedy=remedy)
        for role, rate in rates.items()
    }
    rules = check_rules(rules)

    def init_fn(params: optax.Params) -> optax.EmptyState:
        check_keys("rates", table, labelled(params, model, rules).roles)
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        tree = labelled(updates, model, rules)
        whole = tree if params is None else labelled(params, model, rules)
        check_keys("rates", table, whole.roles)
        factor = {
            leaf.parameter.path: matching(table, leaf.label.role, 1.0)
            for leaf in (*tree.present, *whole.present)
        }
        factors = tree.map(lambda leaf: factor[leaf.parameter.path])
        return jax.tree.map(_scaled, factors, updates), state

    return optax.GradientTransformation(init_fn, update_fn)


def _scaled(factor: Any, update: Any) -> Any:
    if isinstance(factor, float) and factor == 1.0:
        return update
    return jax.tree.map(lambda u: as_floating(u * factor, u), update)
