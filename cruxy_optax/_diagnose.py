"""`diagnose`: sizes by role, what binds, and the name of what is not finite, from inside a step."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cruxy_control.diagnosis import NonFinite, RoleCheck, Stats, TensorCheck, by_role, headline
from cruxy_control.diagnosis import report as table
from cruxy_optax._low_bit import is_low_bit
from cruxy_optax._roles.parameters import labelled, unboxed
from cruxy_optax._stabilize import StabilizeState
from cruxy_optax._states import limit_scale
from cruxy_optax._telemetry import telemetry
from cruxy_optax._tree import accumulator_dtype, find_with_paths


class Row(NamedTuple):
    """Where a number of a `Diagnosis` is from.

    Attributes:
        name: of the tensor.
        role: what it is; `""` for what is no parameter.
        where: `parameter`, `gradient`, `update` or `state`.
        elements: how many it has.
    """

    name: str
    role: str
    where: str
    elements: int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rms", "nonfinite_counts", "controls"],
    meta_fields=["rows"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `diagnose` measured: a pytree of device arrays; printed outside of `jax.jit`, a table.

    What is below `rows` waits for the device, once.

    Attributes:
        rms: the root mean square of the finite numbers of each row; float32.
        nonfinite_counts: how many numbers of each row are NaN or infinite; int32.
        controls: by path of a controller, what `telemetry` gives, and `limit_scale`; empty without
            `opt_state`.
        rows: what each of those numbers is of.
    """

    rms: jax.Array
    nonfinite_counts: jax.Array
    controls: dict[str, dict[str, jax.Array]]
    rows: tuple[Row, ...]

    @property
    def tensors(self) -> tuple[TensorCheck, ...]:
        """What was measured of every parameter."""
        found: dict[str, tuple[str, dict[str, Stats]]] = {}
        for row, stats in self._stats():
            if row.where != "state":
                found.setdefault(row.name, (row.role, {}))[1][row.where] = stats
        return tuple(TensorCheck(name, role, values) for name, (role, values) in found.items())

    @property
    def roles(self) -> dict[str, RoleCheck]:
        """The same by role."""
        return by_role(self.tensors)

    @property
    def nonfinite(self) -> tuple[NonFinite, ...]:
        """The name of every tensor that holds something that is not finite, in what of it."""
        return tuple(
            NonFinite(row.name, row.where, stats.nonfinite, row.elements)
            for row, stats in self._stats()
            if stats.nonfinite
        )

    @property
    def clip_binds(self) -> bool:
        """Whether a controller scaled the gradient down in the last step."""
        return any(shown.get("clip_scale", 1.0) < 1.0 for shown in self._shown().values())

    @property
    def limit_binds(self) -> bool:
        """Whether no tensor got the whole rate, for their relative limits."""
        return any(0.0 < shown["limit_scale"] < 1.0 for shown in self._shown().values())

    def __str__(self) -> str:
        whole = jax.device_get(self)
        lines = []
        for path, shown in whole._shown().items():
            share, limited = shown["limit_scale"], ""
            if 0.0 < share < 1.0:
                limited = f"relative limits bind, no tensor has more than {share:.3g} of the rate"
            lines.append((f"{path}: " if path else "") + headline(shown, limited))
        return table(whole.tensors, whole.nonfinite, lines)

    def _shown(self) -> dict[str, dict[str, float]]:
        """The controls as numbers; of replicated ones, which are all alike, the first."""
        return jax.tree.map(lambda x: float(x.reshape(-1)[0]), jax.device_get(self.controls))

    def _stats(self) -> Iterator[tuple[Row, Stats]]:
        sizes, counts = jax.device_get((self.rms, self.nonfinite_counts))
        if sizes.ndim != 1:
            raise ValueError(
                f"a diagnosis must be that of one step, got one of shape {sizes.shape[:-1]}; take "
                "one of them: jax.tree.map(lambda x: x[-1], diagnosis)."
            )
        for row, rms, count in zip(self.rows, sizes.tolist(), counts.tolist(), strict=True):
            yield row, Stats(row.elements, rms, count)


def diagnose(
    params: optax.Params,
    grads: optax.Updates | None = None,
    updates: optax.Updates | None = None,
    labels: Any = None,
    *,
    opt_state: Any = None,
) -> Diagnosis:
    """Sizes by role, what binds, and the name of every tensor with a NaN or an infinity.

    Works inside a jitted step as outside: what it returns is a pytree of a few device arrays.
    Printed, it is a table with a line a role: root mean squares of parameters, gradients and
    updates, the ratio of the update to the parameter, and how many numbers are not finite; below
    it the names. A root mean square is that of the finite numbers, in float32 or wider. Coded
    leaves (`LowBitArray`) are decoded; one that is not finite makes a whole block so. Under
    `jax.jit` with sharded arrays the whole is measured, under `jax.shard_map` a shard.

    Args:
        params: the parameters, before or after the step. Leaves that are not floating are left
            out.
        grads: a tree like them, `None` or an `optax.MaskedNode` in place of what is missing;
            `None` for no gradients. The raw gradients, as `tx.update` gets them, show a NaN that
            the guard keeps from the updates.
        updates: likewise, what `tx.update` returned.
        labels: a tree of texts like the parameters by which the table sums up; `None` for
            `label_roles(params)`.
        opt_state: the state after the step. With a controller in it the table has its rate, and
            whether its clip and its relative limit bind. What is kept in the state and not finite
            is named by its path; the signals of a skipped step are not kept.

    Returns:
        A `Diagnosis`: on the device `rms` and `nonfinite_counts`, one a row of `rows`; on the host
        `tensors`, `roles`, `nonfinite`, `clip_binds`, `limit_binds`, and the table as text.

    Raises:
        ValueError: where `grads`, `updates` or `labels` are no trees like the parameters.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, cruxy_optax
        >>> params = {"wte": {"embedding": jnp.ones((4, 2))}, "norm": {"scale": jnp.ones(2)}}
        >>> bad = jnp.array([3.0, jnp.nan])
        >>> grads = {"wte": {"embedding": jnp.ones((4, 2))}, "norm": {"scale": bad}}
        >>> tx = cruxy_optax.meta3(1e-3)
        >>> @jax.jit
        ... def step(params, grads, state):
        ...     updates, state = tx.update(grads, state, params, value=1.0)
        ...     return cruxy_optax.diagnose(params, grads, updates, opt_state=state)
        >>> print(step(params, grads, tx.init(params)))
        0 steps, 1 skipped, the last one skipped; learning rate 0.00e+00; no clip binds
        root mean squares by role:
        role       tensors  elements  parameter  gradient    update     ratio  not finite
        norm             1         2   1.00e+00  3.00e+00  0.00e+00  0.00e+00           1
        embedding        1         8   1.00e+00  1.00e+00  0.00e+00  0.00e+00           0
        <BLANKLINE>
        not finite:
          norm.scale: gradient (1 of 2)
    """
    tree = labelled(params, None, ())
    kinds = {"gradient": grads, "update": updates}
    ones = {name: _like(tree.treedef, name, x) for name, x in kinds.items() if x is not None}
    roles = [leaf.label.role for leaf in tree.leaves]
    if labels is not None:
        roles = [str(role) for role in _like(tree.treedef, "labels", labels)]
    rows: list[Row] = []
    numbers: list[tuple[jax.Array, jax.Array]] = []

    def see(name: str, role: str, where: str, node: Any) -> None:
        node = unboxed(node)
        if not jax.tree.leaves(node):  # None, or what `optax.masked` leaves in its place
            return
        x = node.decode() if is_low_bit(node) else jnp.asarray(node)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            rows.append(Row(name, role, where, x.size))
            numbers.append(_measured(x))

    for index, (leaf, role) in enumerate(zip(tree.leaves, roles, strict=True)):
        seen = len(rows)
        see(leaf.name, role, "parameter", leaf.value)
        if len(rows) > seen:
            for where, nodes in ones.items():
                see(leaf.name, role, where, nodes[index])
    kept = jax.tree.map(_without_signals, opt_state, is_leaf=_is_controller)
    state, _ = jax.tree_util.tree_flatten_with_path(kept, is_leaf=is_low_bit)
    for path, node in state:
        see(f"opt_state{jax.tree_util.keystr(path)}", "", "state", node)
    return Diagnosis(
        rms=jnp.asarray([size for size, _ in numbers], jnp.float32),
        nonfinite_counts=jnp.asarray([count for _, count in numbers], jnp.int32),
        controls=_controls(opt_state),
        rows=tuple(rows),
    )


def _is_controller(node: Any) -> bool:
    return isinstance(node, StabilizeState)


def _without_signals(node: Any) -> Any:
    """A state without what was last measured, which is not finite where the gradient was not."""
    return node._replace(signals=None) if _is_controller(node) else node


def _measured(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The root mean square of what is finite, and the count of what is not.

    Scaled by the largest, since squares of large numbers overflow.
    """
    x = jnp.abs(x)
    x = x.astype(accumulator_dtype(x))
    finite = jnp.isfinite(x)
    x = jnp.where(finite, x, 0.0)
    bad = jnp.sum(~finite, dtype=jnp.int32)
    largest = x.max(initial=0.0)
    square = jnp.square(x / jnp.where(largest > 0.0, largest, 1.0)).sum()
    return largest * jnp.sqrt(square / jnp.maximum(float(x.size) - bad, 1.0)), bad


def _like(treedef: Any, name: str, tree: Any) -> list[Any]:
    """What a tree has in place of each parameter."""
    name = {"gradient": "grads", "update": "updates"}.get(name, name)
    message = (
        f"{name} must be a tree like the parameters, got {jax.tree.structure(tree)} for {treedef}; "
        "give None in place of what is missing."
    )
    try:
        nodes = treedef.flatten_up_to(tree)
    except (TypeError, ValueError) as error:
        raise ValueError(message) from error
    if any(len(jax.tree.leaves(node, is_leaf=is_low_bit)) > 1 for node in nodes):
        raise ValueError(message)
    return nodes


def _controls(opt_state: Any) -> dict[str, dict[str, jax.Array]]:
    """What each controller in a state shows, by its path where there are several."""
    found = find_with_paths(opt_state, StabilizeState)
    return {
        jax.tree_util.keystr(path) if len(found) > 1 else "": {
            **telemetry(node),
            "limit_scale": limit_scale(node.inner_state),
        }
        for path, node in found
    }
