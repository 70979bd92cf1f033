"""Optimizers that are to be beaten beside those that people use: newer ones, and other schedules.

What optax has not is written here from the equations of its authors. Weights decay as in
`optimizers`, and one rate moves every parameter: the steps of a matrix have the root mean square of
Adam's. Which parameters are matrices inside the model, for those that treat them apart, is told as
for our own Muon.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from benchmarks._jax.optimizers import SOURCES as PEER_SOURCES
from benchmarks._jax.optimizers import Optimizer, matrices, warm_up_cosine
from benchmarks._rates import WEIGHT_DECAY
from cruxy_control.formulas.orthogonal import orthogonalize
from cruxy_optax import orthogonalize_updates
from cruxy_optax._actuators.orthogonal import orthogonal

SOURCES = (*PEER_SOURCES, "benchmarks/_jax/rivals.py")

MUON_SOURCES = (
    *SOURCES,
    "cruxy_control/formulas/orthogonal.py",
    "cruxy_control/roles.py",
    "cruxy_optax/_actuators/orthogonal.py",
    "cruxy_optax/_roles/*.py",
)
"""Of those that make matrices orthogonal as ours does."""

RMS = 0.2
"""Root mean square of a matrix's step, in units of the rate: about Adam's (Liu et al., 2025)."""

Direction = optax.GradientTransformation


def warm_up_linear(rate: Any, steps: int) -> optax.Schedule:
    """Linear warm-up over a tenth of the run, then linearly to zero."""
    up = steps // 10
    parts = [
        optax.schedules.linear_schedule(0.0, 1.0, up),
        optax.schedules.linear_schedule(1.0, 0.0, steps - up),
    ]
    shape = optax.schedules.join_schedules(parts, [up])
    return lambda count: rate * shape(count)


def _adamw_clipped(rate: Any, steps: int) -> optax.GradientTransformation:
    schedule = warm_up_cosine(rate, steps)
    adamw = optax.adamw(schedule, b2=0.99, weight_decay=WEIGHT_DECAY, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def _schedule_free_adamw(b1: float) -> Callable[[Any, int], optax.GradientTransformation]:
    """With the warm-up that its authors advise; the decay is at the point of the gradient."""

    def make(rate: Any, steps: int) -> optax.GradientTransformation:
        return optax.contrib.schedule_free_adamw(
            rate, warmup_steps=max(1, steps // 10), b1=b1, weight_decay=WEIGHT_DECAY
        )

    return make


def _under_cosine(
    make: Callable[[], Direction],
) -> Callable[[Any, int], optax.GradientTransformation]:
    """A direction with decoupled weight decay, a warm-up and a cosine."""
    return lambda rate, steps: optax.chain(
        make(),
        optax.add_decayed_weights(WEIGHT_DECAY, matrices),
        optax.scale_by_learning_rate(warm_up_cosine(rate, steps)),
    )


class _SoapState(NamedTuple):
    count: Any
    mu: Any  # in the eigenbases
    nu: Any
    grams: list[tuple[jax.Array, ...]]  # of every leaf, one an axis
    bases: list[tuple[jax.Array, ...]]


def _rotated(x: jax.Array, bases: tuple[jax.Array, ...], side: int = 0) -> jax.Array:
    """`x` in these bases, one an axis; with `side` 1 back from them."""
    for base in bases:  # each moves the first axis to the end
        x = jnp.tensordot(x, base, axes=(0, side))
    return x


def _eigenbasis(gram: jax.Array) -> jax.Array:
    return jnp.linalg.eigh(gram)[1][:, ::-1]


def scale_by_soap(
    b1: float = 0.95, b2: float = 0.95, eps: float = 1e-8, every: int = 10
) -> Direction:
    """Adam in the eigenbases of Shampoo's preconditioners, which a QR step follows.

    The first step is skipped, since the bases come from its gradient. Vectors get Adam.

    Args:
        b1: decay rate of the first moment.
        b2: decay rate of the second moment and of the preconditioners.
        eps: added to the root of the second moment.
        every: steps between two QR steps.

    References:
        Vyas et al., [SOAP](https://arxiv.org/abs/2409.11321), 2024, algorithms 3 and 4, with the
        defaults of the authors' code.
    """

    def init(params: Any) -> _SoapState:
        zeros = optax.tree.zeros_like(params)
        grams = [
            tuple(jnp.zeros((n, n)) for n in leaf.shape) if leaf.ndim > 1 else ()
            for leaf in jax.tree.leaves(params)
        ]
        return _SoapState(jnp.zeros((), jnp.int32), zeros, zeros, grams, grams)

    def of_leaf(count: jax.Array, g: Any, mu: Any, nu: Any, grams: Any, bases: Any) -> Any:
        turned = _rotated(g, bases)
        mu, nu = b1 * mu + (1.0 - b1) * turned, b2 * nu + (1.0 - b2) * turned * turned
        steps = jnp.maximum(count, 1)
        unit = (mu / (1.0 - b1**steps)) / (jnp.sqrt(nu / (1.0 - b2**steps)) + eps)
        update = jnp.where(count > 0, _rotated(unit, bases, side=1), 0.0)
        if not grams:
            return update, mu, nu, grams, bases
        others = [[a for a in range(g.ndim) if a != axis] for axis in range(g.ndim)]
        grams = tuple(
            b2 * gram + (1.0 - b2) * jnp.tensordot(g, g, axes=(over, over))
            for gram, over in zip(grams, others, strict=True)
        )

        def begin() -> Any:
            return jnp.zeros_like(mu), jnp.zeros_like(nu), tuple(map(_eigenbasis, grams))

        def keep() -> Any:
            return mu, nu, bases

        def refresh() -> Any:
            straight, second, found = _rotated(mu, bases, side=1), nu, []
            for axis, (gram, base) in enumerate(zip(grams, bases, strict=True)):
                order = jnp.argsort(-jnp.diag(base.T @ gram @ base))
                second = jnp.take(second, order, axis=axis)
                found.append(jnp.linalg.qr(gram @ base[:, order])[0])
            return _rotated(straight, tuple(found)), second, tuple(found)

        case = jnp.where(count == 0, 0, jnp.where(count % every == 0, 2, 1))
        mu, nu, bases = lax.switch(case, [begin, keep, refresh])
        return update, mu, nu, grams, bases

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        leaves, treedef = jax.tree.flatten(updates)
        moments = map(treedef.flatten_up_to, (state.mu, state.nu))
        columns = (leaves, *moments, state.grams, state.bases)
        found = [of_leaf(state.count, *own) for own in zip(*columns, strict=True)]
        steps, mu, nu, grams, bases = map(list, zip(*found, strict=True))
        mu, nu = treedef.unflatten(mu), treedef.unflatten(nu)
        count = optax.safe_increment(state.count)
        return treedef.unflatten(steps), _SoapState(count, mu, nu, grams, bases)

    return optax.GradientTransformation(init, update)


class _NorMuonState(NamedTuple):
    mu: Any
    nu: Any  # of every output


def _scale_by_normuon(b1: float, b2: float = 0.95, eps: float = 1e-10) -> Direction:
    """Orthogonal momenta whose outputs are divided by their root mean squares over time.

    Args:
        b1: decay rate of the momentum.
        b2: decay rate of the outputs' mean squares.
        eps: added to their roots.

    References:
        Li et al., [NorMuon](https://arxiv.org/abs/2510.05491), 2025, algorithm 1.
    """

    def init(params: Any) -> _NorMuonState:
        rows = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[-1]), params)
        return _NorMuonState(optax.tree.zeros_like(params), rows)

    def polar(m: jax.Array) -> jax.Array:
        flat = m.reshape(-1, m.shape[-1])
        if flat.shape[0] > flat.shape[1]:
            return orthogonalize(flat.T, xp=jnp).T
        return orthogonalize(flat, xp=jnp)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        polars = jax.tree.map(polar, mu)
        nu = jax.tree.map(
            lambda v, p: b2 * v + (1.0 - b2) * jnp.mean(p * p, axis=0), state.nu, polars
        )

        def scaled(p: jax.Array, v: jax.Array, m: jax.Array) -> jax.Array:
            even = p / (jnp.sqrt(v) + eps)
            size = jnp.sqrt(jnp.mean(even * even))
            return (RMS / jnp.maximum(size, eps) * even).reshape(m.shape)

        return jax.tree.map(scaled, polars, nu, mu), _NorMuonState(mu, nu)

    return optax.GradientTransformation(init, update)


def _muon() -> Direction:
    orthogonal_momentum = optax.chain(optax.trace(0.95), orthogonalize_updates())
    return optax.chain(orthogonal_momentum, optax.scale(RMS / 0.1))


def _by_kind(matrix: Direction, other: Direction) -> Direction:
    """A direction for matrices inside the model and another for the rest."""
    return optax.partition({True: matrix, False: other}, orthogonal())


def _root_mean_square(b2: float) -> Direction:
    """Adam's direction without a first moment, which schedule-free averaging replaces."""
    return optax.scale_by_rms(b2, 1e-8, eps_in_sqrt=False, bias_correction=True)


class _AnytimeState(NamedTuple):
    count: Any
    total: jax.Array
    share: jax.Array  # of the average in the parameters
    z: Any
    inner: Any


def _anytime(
    direction: Direction, rate: Any, warm_up: int, first: float, power: float = 0.0
) -> optax.GradientTransformation:
    """Schedule-free averaging around a direction.

    Gradients are taken at `y_t = (1 - beta_t) z_t + beta_t x_t`, with `beta_t = first` while the
    rate warms up and then `1 - ((T - 1) / (t - 1))^power (1 - first)` (AMUSE, equation 1). The
    decay is at `z`, and the average `x` weighs each `z` by the square of its rate.

    Args:
        direction: of size about 1.
        rate: after the warm-up.
        warm_up: its steps, `T`, over which the rate rises linearly.
        first: `beta_1`.
        power: 0 for a constant `beta_t`.
    """

    def share_of(t: jax.Array) -> jax.Array:
        later = jnp.maximum(t - 1.0, 1.0)
        risen = 1.0 - ((warm_up - 1.0) / later) ** power * (1.0 - first)
        return jnp.where(t <= warm_up, first, risen)

    def init(params: Any) -> _AnytimeState:
        zero, z = jnp.zeros((), jnp.float32), jax.tree.map(jnp.copy, params)
        share = jnp.full((), first, jnp.float32)
        return _AnytimeState(jnp.zeros((), jnp.int32), zero, share, z, direction.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        count = optax.safe_increment(state.count)
        length = rate * jnp.minimum(1.0, count / warm_up)
        total = state.total + length**2
        weight = length**2 / total
        steps, inner = direction.update(updates, state.inner, state.z)
        x = _average(state, params)
        z = jax.tree.map(
            lambda z, u, m: z - length * (u + WEIGHT_DECAY * m * z),
            *(state.z, steps, matrices(params)),
        )
        x = jax.tree.map(lambda x, z: x + weight * (z - x), x, z)
        share = share_of(state.count + 2.0)
        moved = jax.tree.map(lambda x, z, y: z + share * (x - z) - y, x, z, params)
        return moved, _AnytimeState(count, total, share, z, inner)

    return optax.GradientTransformation(init, update)


def _average(state: _AnytimeState, params: Any) -> Any:
    """`x`, which is what there is to evaluate."""
    return jax.tree.map(lambda y, z: z + (y - z) / state.share, params, state.z)


def _sf_normuon(rate: Any, steps: int) -> optax.GradientTransformation:
    """SF-NorMuon from its algorithm 1, whose other constants are those of the port that names them.

    References:
        Apte et al., [Anytime Training with Schedule-Free Spectral
        Optimization](https://arxiv.org/abs/2605.23061), 2026.
    """
    direction = _by_kind(_scale_by_normuon(0.8), _root_mean_square(0.95))
    return _anytime(direction, rate, max(2, steps // 10), first=0.9)


def _amuse(rate: Any, steps: int) -> optax.GradientTransformation:
    """AMUSE from its equations, with the constants for language models that a port of it gives.

    The warm-up is a tenth of the run, and the default rate is Schedule-Free AdamW's.

    References:
        Kim et al., [AMUSE](https://arxiv.org/abs/2605.22432), 2026, equation 1, and
        https://github.com/kjeiun/amuse.
    """
    direction = _by_kind(_muon(), _root_mean_square(0.999))
    return _anytime(direction, rate, max(2, steps // 10), first=0.6, power=0.8)


RIVALS = {
    "adamw-clipped-cosine": Optimizer(
        "AdamW, b2 0.99, clip, cosine", _adamw_clipped, sources=SOURCES
    ),
    "schedule-free-0.95": Optimizer(
        "Schedule-Free AdamW, b1 0.95, warm-up",
        _schedule_free_adamw(0.95),
        averaged=optax.contrib.schedule_free_eval_params,
        default=2.5e-3,
        sources=SOURCES,
    ),
    "schedule-free-0.98": Optimizer(
        "Schedule-Free AdamW, b1 0.98, warm-up",
        _schedule_free_adamw(0.98),
        averaged=optax.contrib.schedule_free_eval_params,
        default=2.5e-3,
        sources=SOURCES,
    ),
    "soap-cosine": Optimizer(
        "SOAP, warm-up and cosine", _under_cosine(scale_by_soap), default=3e-3, sources=SOURCES
    ),
    "normuon-cosine": Optimizer(
        "NorMuon, warm-up and cosine",
        _under_cosine(lambda: _by_kind(_scale_by_normuon(0.95), optax.scale_by_adam(0.9, 0.95))),
        sources=MUON_SOURCES,
    ),
    "sf-normuon": Optimizer(
        "SF-NorMuon", _sf_normuon, averaged=_average, default=8e-3, sources=MUON_SOURCES
    ),
    "amuse": Optimizer("AMUSE", _amuse, averaged=_average, default=2.5e-3, sources=MUON_SOURCES),
}
"""By name."""
