"""`scale_by_voted_lion`: Lion's sign by the majority of the devices along a mesh axis."""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from cruxy_control.checks import check_count
from cruxy_control.controls import Controls, betas
from cruxy_exact.votes import ballots, coins, majority, pack_votes, unpack_votes
from cruxy_optax._actuators.moments import check_betas, check_floating, first_moment_like, masked
from cruxy_optax._controls import materialize, require_controls
from cruxy_optax._distributed.axes import gathered, split_axes, varying
from cruxy_optax._distributed.compressed import exchanged, tracked
from cruxy_optax._places import element_numbers


class ScaleByVotedLionState(NamedTuple):
    """Lion's moment of each device."""

    mu: optax.Updates  # each leaf with an axis before its own, one device's part of it; mu_dtype
    count: jax.Array  # good steps, wrapping; shape=(), dtype=int32
    beta1: jax.Array  # this step's, 1 on a skipped step; shape=(), dtype=float32
    beta2: jax.Array  # this step's, 1 on a skipped step; shape=(), dtype=float32

    held_by_controls = True
    telemetry = ("beta1", "beta2")

    @property
    def first_moment(self) -> optax.Updates:
        """What a law that steers by the alignment compares this device's gradient with."""
        return jax.tree.map(lambda m: m[0], self.mu)


def scale_by_voted_lion(
    axis_name: str,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.99,
    mu_dtype: Any | None = None,
    *,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion's direction by majority vote: a bit an element on the wire, no mean of gradients.

    Every device keeps the momentum of its own gradients, and votes for the sign of

    $$
    c_t = \beta_{1,t} m_{t-1} + (1 - \beta_{1,t}) g_t, \qquad
    m_t = \beta_{2,t} m_{t-1} + (1 - \beta_{2,t}) g_t \qquad \text{(WP 11, 12)}
    $$

    The direction is what most devices say. In a tie, and for a device whose $c$ is 0, a coin is
    thrown that is the same on all devices and turns over every step: what nobody pushes is moved to
    and fro and stays where it is.

    Args:
        axis_name: of an enclosing `jax.shard_map` (or `jax.pmap`, or `jax.vmap`).
        b1: base of the rate inside the sign, in `[0, 1)`.
        b2: base of the momentum's decay, in `[0, 1)`.
        mu_dtype: dtype of the momentum; `None` is the parameter's, but float32 for float16.
        seed: of the coins, any whole number.

    Returns:
        An `optax.GradientTransformationExtraArgs`, for use inside `stabilize(..., replica_axes=)`.
        Each leaf of its momentum has one axis more, the devices: see `vote_specs`.

    Raises:
        ValueError: where an argument is outside its range; from `update` outside `stabilize`, or
            where the state is of more devices than there are, see `merge_votes`.

    References:
        Liu et al., [Communication Efficient Distributed Training with Distributed
        Lion](https://arxiv.org/abs/2404.00438), 2024; Bernstein et al., [signSGD with Majority
        Vote](https://arxiv.org/abs/1810.05291), 2018.
    """
    b1, b2 = check_betas(b1, b2)
    check_floating(mu_dtype)

    def init_fn(params: optax.Params) -> ScaleByVotedLionState:
        one, mu = jnp.ones((), jnp.float32), first_moment_like(params, mu_dtype)
        mu = jax.tree.map(lambda m: _own(m[None], axis_name), mu)
        return ScaleByVotedLionState(mu, jnp.zeros((), jnp.int32), one, one)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        controls: Controls | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByVotedLionState]:
        del params, extra_args
        controls = require_controls(controls, "scale_by_voted_lion")
        beta1, beta2 = betas(controls, b1, b2, xp=jnp)
        beta1, beta2, rest1, rest2 = materialize(beta1, beta2, 1.0 - beta1, 1.0 - beta2)
        grads = jax.tree.map(lambda g: masked(g, controls), updates)
        leaves, structure = jax.tree.flatten(grads)
        momenta = structure.flatten_up_to(state.mu)
        _check_one_each(momenta, axis_name)
        pairs = [(g, m[0].astype(g.dtype)) for g, m in zip(leaves, momenta, strict=True)]
        signs = _majority([beta1 * m + rest1 * g for g, m in pairs], state.count, seed, axis_name)
        new = structure.unflatten([(beta2 * m + rest2 * g)[None] for g, m in pairs])
        mu = jax.tree.map(lambda m, old: m.astype(old.dtype), new, state.mu)
        count = state.count + controls.ok.astype(jnp.int32)
        return structure.unflatten(signs), ScaleByVotedLionState(mu, count, beta1, beta2)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def vote_specs(
    tx: optax.GradientTransformation, params: optax.Params, axis_name: str
) -> optax.OptState:
    """How the state of an optimizer that votes lies on a mesh: `in_specs` for `jax.shard_map`.

    Args:
        tx: the optimizer, `meta_lion(..., vote=axis_name)` or a chain with `scale_by_voted_lion`.
        params: its parameters, arrays or `jax.ShapeDtypeStruct`.
        axis_name: along which devices vote.

    Returns:
        A tree like the state: `P(axis_name)` for the momenta, of which each device has its own,
        `P()` for all else.

    Examples:
        ```python
        specs = cruxy_optax.vote_specs(tx, params, "data")
        init = jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs)
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=(P(), specs)
        )
        ```
    """

    def spec(node: Any) -> Any:
        split = PartitionSpec(axis_name) if isinstance(node, ScaleByVotedLionState) else None
        everywhere = jax.tree.map(lambda _: PartitionSpec(), node)
        if split is None:
            return everywhere
        return everywhere._replace(mu=jax.tree.map(lambda _: split, node.mu))

    state = jax.eval_shape(tx.init, params)
    return jax.tree.map(spec, state, is_leaf=lambda n: isinstance(n, ScaleByVotedLionState))


def merge_votes(state: optax.OptState, devices: int) -> optax.OptState:
    """The state of an optimizer that votes, for another number of devices.

    Where the number changes, the momentum of each device becomes the mean of those there were,
    which is that of the mean gradient, and every device goes its own way from there. For as many
    devices as before it is the state itself, from which a run goes on bit for bit.

    Args:
        state: of `meta_lion(vote=)` or a chain with `scale_by_voted_lion`, as arrays of all
            devices.
        devices: along the axis of the vote from now on, at least 1.

    Returns:
        The same with the momenta of so many devices, to be laid on a mesh by `vote_specs`.

    Raises:
        ValueError: where nothing in the state votes, or `devices` is below 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from cruxy_optax import merge_votes, meta_lion
        >>> state = meta_lion(1e-4, vote="data").init(jnp.ones(3))
        >>> merge_votes(state, 4).inner_state[1].mu.shape
        (4, 3)
    """
    check_count("devices", devices, 1, remedy="count those along the axis of the vote")
    found = []

    def mean(m: jax.Array) -> jax.Array:
        if m.shape[0] == devices:
            return m
        one = jnp.mean(m.astype(jnp.float32), axis=0, keepdims=True).astype(m.dtype)
        return jnp.broadcast_to(one, (devices, *m.shape[1:]))

    def merged(node: Any) -> Any:
        if not isinstance(node, ScaleByVotedLionState):
            return node
        found.append(node)
        return node._replace(mu=jax.tree.map(mean, node.mu))

    new = jax.tree.map(merged, state, is_leaf=lambda n: isinstance(n, ScaleByVotedLionState))
    if not found:
        raise ValueError(
            "state must be of an optimizer that votes, got one without a scale_by_voted_lion; any "
            "other is the same on every number of devices."
        )
    return new


def _check_one_each(momenta: list[jax.Array], axis_name: str) -> None:
    for m in momenta:
        if m.shape[0] != 1:
            raise ValueError(
                f"a state must hold one momentum for each device along {axis_name!r}, got "
                f"{m.shape[0]} on each; one of another number of devices goes through "
                "cruxy_optax.merge_votes(state, devices)."
            )


def _own(x: jax.Array, axis_name: str) -> jax.Array:
    """The array as one that may differ by device, where types tell; itself outside of the axis."""
    try:
        told = tracked(axis_name)
    except NameError:  # outside, as where the shape of a state is asked for
        return x
    return varying(x, axis_name) if told and axis_name not in split_axes(x) else x


def _majority(cs: list[jax.Array], count: jax.Array, seed: int, axis_name: str) -> list[jax.Array]:
    """The sign that most devices say, 1 or -1, of each leaf: one exchange for all of them."""
    ranks = int(lax.psum(1, axis_name))
    thrown = [
        coins(count, seed, leaf, element_numbers(c.shape), xp=jnp) for leaf, c in enumerate(cs)
    ]
    own = [ballots(c, coin, xp=jnp) for c, coin in zip(cs, thrown, strict=True)]
    votes, coin = (jnp.concatenate([x.reshape(-1) for x in xs]) for xs in (own, thrown))
    missing = -votes.size % (8 * ranks)
    votes, coin = (jnp.pad(x, (0, missing)).reshape(ranks, -1) for x in (votes, coin))
    received = exchanged(pack_votes(votes, xp=jnp), axis_name)
    ayes = unpack_votes(received, xp=jnp).sum(0, dtype=jnp.int32)
    won = majority(ayes, ranks, coin[lax.axis_index(axis_name)], xp=jnp)
    whole = unpack_votes(gathered(pack_votes(won, xp=jnp), axis_name), xp=jnp).reshape(-1)
    signs, end = [], 0
    for c in cs:
        begin, end = end, end + math.prod(c.shape)
        sign = jnp.where(whole[begin:end], 1.0, -1.0).astype(c.dtype)
        signs.append(sign.reshape(c.shape))
    return signs
