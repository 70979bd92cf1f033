"""`role_table`: which roles a tree of parameters has, to be looked at."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from cruxy_control.checks import check_range
from cruxy_control.role_table import Entry, RoleTable, table_of
from cruxy_control.roles import Rule, check_keys, is_decayed, matching
from cruxy_optax._roles.parameters import labelled


def role_table(
    params: Any,
    *,
    rates: Mapping[str, float] | None = None,
    decays: Mapping[str, float] | None = None,
    rules: Iterable[Rule] = (),
    model: Any = None,
) -> RoleTable:
    """What the parameters are, with their multiples of rate and decay: printed, a table.

    Args:
        params: see `label_roles`; shapes will do.
        rates: by role or beginning of one, as `scale_by_role` takes them.
        decays: likewise, multiples of the weight decay; the default is 1, and 0 for norms, biases,
            positions, vectors, LoRA's magnitudes, and matrices that no layer owns. In a chain
            these are what a mask is for: `optax.adamw(1e-3, mask=role_mask("attention", "mlp"))`.
        rules: see `label_roles`.
        model: likewise.

    Returns:
        A table with `rows`, to be printed.

    Raises:
        ValueError: where a key is no role, a number is below 0 or not finite, and as in
            `label_roles`.

    Examples:
        >>> import jax.numpy as jnp, cruxy_optax
        >>> params = {
        ...     "wte": {"embedding": jnp.ones((96, 32))},
        ...     "attn": {"c_attn": {"kernel": jnp.ones((32, 96)), "bias": jnp.ones(96)}},
        ... }
        >>> table = cruxy_optax.role_table(params, rates={"embedding": 0.5})
        >>> for row in table.rows:
        ...     print(row.role, row.tensors, row.parameters, row.rate, row.decay, row.example)
        bias 1 96 1.0 0.0 attn.c_attn.bias
        attention.qkv 1 3072 1.0 1.0 attn.c_attn.kernel
        embedding 1 3072 0.5 1.0 wte.embedding
        >>> print(str(table).splitlines()[1])
        bias (attention.qkv) ... x 1      x 0  name        attn.c_attn.bias
    """
    leaves = labelled(params, model, rules).present
    present = [leaf.label.role for leaf in leaves]
    rates, decays = _checked("rates", rates, present), _checked("decays", decays, present)
    return table_of(
        Entry(
            leaf.name,
            leaf.label,
            math.prod(leaf.parameter.shape),
            matching(rates, leaf.label.role, 1.0),
            matching(decays, leaf.label.role, float(is_decayed(leaf.label, leaf.parameter))),
        )
        for leaf in leaves
    )


def _checked(
    name: str, table: Mapping[str, float] | None, present: Iterable[str]
) -> Mapping[str, float]:
    check_keys(name, table or {}, present)
    remedy = "1 changes nothing, 0 switches it off"
    return {
        key: check_range(f"{name}[{key!r}]", value, 0.0, math.inf, upper_open=True, remedy=remedy)
        for key, value in (table or {}).items()
    }
