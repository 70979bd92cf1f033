"""`label_roles` and `role_mask`: what each parameter is, for optax's partition and masks."""

from collections.abc import Iterable
from typing import Any

from cruxy_control.roles import ROLES, Rule, check_keys, check_rules, matching
from cruxy_optax._roles.parameters import labelled


def label_roles(params: Any, model: Any = None, rules: Iterable[Rule] = ()) -> Any:
    """What each parameter is: an embedding, a query, a norm, a bias, for any optimizer.

    Roles follow from names, shapes and, where there are any, classes; `cruxy_control.roles.ROLES`
    has all of them. What nothing tells is `"matrix"` or `"vector"`, never another's role: so it is
    with linen's `Dense_0`, and a name (`nn.Dense(8, name="lm_head")`) or a rule tells.

    Args:
        params: a tree of parameters or of their shapes (`jax.eval_shape`): dictionaries of linen,
            an `nnx.State` or `nnx.Module`, a module of Equinox, any pytree.
        model: an object whose attributes have the paths of `params`, such as the `nnx.Module` that
            they are the state of, whose classes then tell what names do not. Not needed where
            `params` is itself such an object.
        rules: pairs that come before everything else, the first that matches counts: a shell
            pattern for the dotted path (`"*.adapter.*"`) or a function of that and the
            `cruxy_control.roles.Parameter`, and a role.

    Returns:
        A tree like `params` with a role for each leaf, as `optax.partition` takes it. Those of an
        `nnx.State` stand in the place of its variables, for `nnx.Optimizer` and without it.

    Raises:
        ValueError: where a rule names no role, or `model` has no parameter of `params`.
        TypeError: where a rule is no such pair.

    Examples:
        >>> import jax.numpy as jnp, optax, cruxy_optax
        >>> params = {
        ...     "wte": {"embedding": jnp.ones((8, 4))},
        ...     "attn": {"query": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}},
        ... }
        >>> labels = cruxy_optax.label_roles(params)
        >>> print(labels["wte"], labels["attn"])
        {'embedding': 'embedding'} {'query': {'bias': 'bias', 'kernel': 'attention.q'}}
        >>> tx = optax.partition(
        ...     {"embedding": optax.sgd(0.1), "attention.q": optax.adam(1e-3),
        ...      "bias": optax.set_to_zero()}, labels)
    """
    return labelled(params, model, rules).map(lambda leaf: leaf.label.role)


def role_mask(params: Any, *keys: str, model: Any = None, rules: Iterable[Rule] = ()) -> Any:
    """Which parameters have one of these roles: a mask for `optax.masked` and all that takes one.

    Args:
        params: see `label_roles`. Left out, so that the first argument is a role already, the
            result is a function of the parameters, which masks of optax may be too.
        *keys: roles or beginnings of them: `"attention"` is `"attention.q"` and all the others.
            Biases have a role of their own, `"bias"`.
        model: see `label_roles`.
        rules: likewise.

    Returns:
        A tree of booleans like `params`, or a function that makes it.

    Raises:
        ValueError: where a key is no role nor the beginning of one (the message lists the roles
            that the parameters have, or all there are where those are left out), there is no key,
            and as in `label_roles`.

    Examples:
        >>> import jax.numpy as jnp, optax, cruxy_optax
        >>> params = {
        ...     "norm": {"scale": jnp.ones(4)},
        ...     "mlp": {"up": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}},
        ... }
        >>> cruxy_optax.role_mask(params, "attention", "mlp")
        {'mlp': {'up': {'bias': False, 'kernel': True}}, 'norm': {'scale': False}}
        >>> decayed = cruxy_optax.role_mask("attention", "mlp", "embedding", "head")
        >>> tx = optax.adamw(1e-3, weight_decay=0.1, mask=decayed)
    """
    rules = check_rules(rules)
    if isinstance(params, str):
        every = (params, *keys)
        for key in every:
            if not any(matching({key: True}, role, False) for role in ROLES):
                raise ValueError(
                    f"the keys of role_mask must be roles or beginnings of them, got {key!r}; "
                    f"roles are {', '.join(ROLES)}."
                )
        return lambda params: role_mask(params, *every, model=model, rules=rules)
    if not keys:
        raise ValueError(
            'role_mask() needs at least one role, got none; "attention", "mlp" are the matrices '
            "inside a transformer."
        )
    tree, table = labelled(params, model, rules), dict.fromkeys(keys, True)
    check_keys("role_mask", keys, tree.roles)
    return tree.map(lambda leaf: matching(table, leaf.label.role, False))
