"""What is compared: grids, schedules and defaults, and the optimizers that no package offers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import _rates
from benchmarks._jax.entries import FEW_STARTS
from benchmarks._jax.optimizers import (
    GUARDED_PEERS,
    PEERS,
    warm_up_cosine,
    warm_up_stable_decay,
)
from benchmarks._jax.our_optimizers import OPTIMIZERS
from benchmarks._jax.rivals import RIVALS, scale_by_soap, warm_up_linear
from benchmarks._rates import RATES, STARTS
from benchmarks._torch.our_optimizers import OPTIMIZERS as TORCH_OPTIMIZERS

STEPS = 40


def test_schedule_ends_at_zero():
    for make in (warm_up_cosine, warm_up_linear, warm_up_stable_decay):
        schedule = make(1.0, 100)
        values = [float(schedule(step)) for step in range(101)]
        assert values[0] == 0.0
        assert max(values) == pytest.approx(1.0)
        assert values[100] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("steps", [8, 40, 1000])
def test_schedule_is_the_same_in_both_frameworks(steps):
    optaxs = warm_up_cosine(1.0, steps)
    ours = [_rates.warm_up_cosine(step, steps) for step in range(steps + 1)]
    # A cosine of about -1 and 1 cancel at the end: two roundings of 1.
    np.testing.assert_allclose(ours, [optaxs(step) for step in range(steps + 1)], atol=2.0**-22)


def test_every_grid_spans_the_same_decades():
    for optimizer in OPTIMIZERS.values():
        if optimizer.grid == STARTS:
            assert (optimizer.rates()[0], optimizer.rates()[-1]) == (1e-6, 10.0)
            continue
        grid = optimizer.rates()
        if grid == FEW_STARTS:  # beside tuned optimizers alone
            continue
        assert len(grid) == len(RATES)
        assert grid[-1] / grid[0] == pytest.approx(RATES[-1] / RATES[0], rel=1e-4)


def test_no_name_stands_twice_in_the_registry():
    assert len(PEERS | GUARDED_PEERS | RIVALS) == sum(map(len, (PEERS, GUARDED_PEERS, RIVALS)))
    labels = [optimizer.label for optimizer in OPTIMIZERS.values()]
    assert len(set(labels)) == len(labels)


def test_defaults_are_known_in_both_frameworks():
    for name, ours in OPTIMIZERS.items():
        theirs = TORCH_OPTIMIZERS.get(name)
        assert theirs is None or theirs.default == ours.default, name
    assert OPTIMIZERS["prodigy"].default == TORCH_OPTIMIZERS["prodigy"].default == 1.0


def driven(name, losses, params, grads, rate=1.0):
    """Parameters of a peer, and those to evaluate at, after a step for every loss and gradient."""
    peer = OPTIMIZERS[name]
    tx = optax.with_extra_args_support(peer.make(rate, STEPS))
    params = jax.tree.map(jnp.float32, params)
    state = tx.init(params)
    for loss, grad in zip(losses, grads, strict=True):
        grad = jax.tree.map(jnp.float32, grad)
        updates, state = tx.update(grad, state, params, value=jnp.float32(loss))
        params = optax.apply_updates(params, updates)
    return params, peer.averaged(state, params)


def drawn(steps, seed=0):
    """Losses that fall and rise, a matrix and a vector, and gradients of theirs."""
    rng = np.random.default_rng(seed)
    losses = 2.0 + np.sin(np.arange(steps) / 3.0) * np.linspace(0.1, 1.9, steps)
    shapes = {"w": (3, 2), "b": (4,)}
    params, *grads = [{k: rng.normal(size=n) for k, n in shapes.items()} for _ in range(steps + 1)]
    return losses, params, grads


def adam_moments(grads, b1, b2):
    """The moments after each gradient, not debiased."""
    mu = nu = dict.fromkeys(grads[0], 0.0)
    for grad in grads:
        mu = {k: b1 * mu[k] + (1 - b1) * g for k, g in grad.items()}
        nu = {k: b2 * nu[k] + (1 - b2) * g * g for k, g in grad.items()}
        yield mu, nu


def test_schedule_free_plus_follows_the_equations_of_its_author():
    losses, start, grads = drawn(12)
    x, y, z = dict(start), dict(start), dict(start)
    largest = total = 0.0
    moments = adam_moments(grads, 0.9, 0.95)
    for t, (loss, grad, (mu, nu)) in enumerate(zip(losses, grads, moments, strict=True), 1):
        ahead = 0.9 * sum((grad[k] * (z[k] - x[k])).sum() for k in grad)
        norm = sum(np.abs(g).sum() for g in grad.values()) * math.sqrt(math.pi / 2)
        length = max(0.0, loss + ahead) / norm
        for k in grad:
            if grad[k].ndim == 2:
                z[k] = z[k] - 10.0 * length**2 * y[k]
            unit = mu[k] / (1 - 0.9**t) / (np.sqrt(nu[k] / (1 - 0.95**t)) + 1e-8)
            z[k] = z[k] - length * unit
        largest = max(largest, length)
        total += largest**2
        x = {k: x[k] + largest**2 / total * (z[k] - x[k]) for k in x}
        y = {k: 0.9 * x[k] + 0.1 * z[k] for k in x}
    params, averaged = driven("schedule-free-plus", losses, start, grads)
    for k in x:
        np.testing.assert_allclose(params[k], y[k], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(averaged[k], x[k], rtol=1e-4, atol=1e-5)


def test_emosens_follows_the_formulas_of_its_author():
    losses, start, grads = drawn(60)
    short = long = losses[0]
    noise, signal, ratio = 1.0, 0.02, 1.0
    want, branches = dict(start), set()
    moments = adam_moments(grads, 0.9, 0.995)
    for loss, (mu, nu) in zip(losses, moments, strict=True):
        short, long = 0.3 * loss + 0.7 * short, 0.01 * loss + 0.99 * long
        scalar = math.tanh((long - short) / long)
        trust = math.copysign(1 - abs(scalar), scalar)
        noise = 0.97 * noise + 0.03 * abs(scalar)
        signal = 0.97 * signal + 0.03 * abs(trust)
        now = ((abs(noise - signal) + 0.1) / (abs(scalar - trust) + 0.1)) ** 2
        if now >= ratio and trust >= 0.5:
            branches.add("faster")
            ratio = min(now, 1.05 * ratio)
        elif -0.5 <= trust <= 0.5:
            branches.add("slower")
            ratio = 0.98 * now
        else:
            branches.add("held")
        rate = min(max(1e-4 * ratio, 1e-6), 3e-3)
        for k in want:
            decay = 0.1 if want[k].ndim == 2 else 0.0
            unit = mu[k] / (np.sqrt(nu[k]) + 1e-8)
            want[k] = want[k] - rate * (decay * want[k] + unit)
    assert branches == {"faster", "slower", "held"}
    params, _ = driven("emosens", losses, start, grads)
    for k in want:
        moved = np.abs(want[k] - start[k]).max()
        np.testing.assert_allclose(params[k], want[k], atol=1e-3 * moved)


def newton_schulz(x):
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def normuon_directions(grads, b1):
    """Of the matrix, from the equations of its authors, whose rows are the outputs."""
    m = v = 0.0
    for grad in grads:
        m = b1 * m + (1 - b1) * grad["w"].T
        polar = newton_schulz(m)
        v = 0.95 * v + 0.05 * (polar**2).mean(1, keepdims=True)
        even = polar / np.sqrt(v)
        yield (0.2 * math.sqrt(even.size) / np.linalg.norm(even) * even).T


def muon_directions(grads):
    m = 0.0
    for grad in grads:
        m = 0.95 * m + grad["w"]
        yield 0.2 * math.sqrt(3) * newton_schulz(m.T).T


@pytest.mark.parametrize("name", ["sf-normuon", "amuse"])
def test_anytime_muon_follows_the_equations_of_its_authors(name):
    losses, start, grads = drawn(12)
    x, y, z = dict(start), dict(start), dict(start)
    first, power, b2 = {"sf-normuon": (0.9, 0.0, 0.95), "amuse": (0.6, 0.8, 0.999)}[name]
    matrix = normuon_directions(grads, 0.8) if name == "sf-normuon" else muon_directions(grads)
    warm_up, total = STEPS // 10, 0.0
    squares = adam_moments(grads, 0.0, b2)
    for t, (grad, unit, (_, nu)) in enumerate(zip(grads, matrix, squares, strict=True), 1):
        rate = 0.02 * min(1.0, t / warm_up)
        other = grad["b"] / (np.sqrt(nu["b"] / (1 - b2**t)) + 1e-8)
        z = {"w": z["w"] - rate * (unit + 0.1 * z["w"]), "b": z["b"] - rate * other}
        total += rate**2
        x = {k: x[k] + rate**2 / total * (z[k] - x[k]) for k in x}
        late = t + 1 > warm_up
        beta = 1 - ((warm_up - 1) / t) ** power * (1 - first) if late else first
        y = {k: (1 - beta) * z[k] + beta * x[k] for k in x}
    params, averaged = driven(name, losses, start, grads, rate=0.02)
    for k in x:
        np.testing.assert_allclose(params[k], y[k], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(averaged[k], x[k], rtol=1e-4, atol=1e-5)


def test_normuon_follows_the_equations_of_its_authors():
    losses, start, grads = drawn(6)
    schedule = warm_up_cosine(0.02, STEPS)
    want = start["w"]
    for t, unit in enumerate(normuon_directions(grads, 0.95)):
        want = want - float(schedule(t)) * (unit + 0.1 * want)
    params, _ = driven("normuon-cosine", losses, start, grads, rate=0.02)
    np.testing.assert_allclose(params["w"], want, rtol=1e-4, atol=1e-5)


def test_soap_follows_the_code_of_its_authors():
    _, _, grads = drawn(25)
    tx = scale_by_soap()
    state = tx.init(jax.tree.map(jnp.float32, grads[0]))
    update = jax.jit(tx.update)
    m = v = np.zeros((3, 2))
    grams, bases = [0.0, 0.0], [np.eye(3), np.eye(2)]
    for t, grad in enumerate(grads):
        found, state = update(jax.tree.map(jnp.float32, grad), state)
        g, (left, right) = grad["w"], bases
        want = np.zeros((3, 2))
        if t:  # m is kept outside the bases here
            m, v = 0.95 * m + 0.05 * g, 0.95 * v + 0.05 * (left.T @ g @ right) ** 2
            within = (left.T @ m @ right) / (1 - 0.95**t)
            unit = within / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            want = left @ unit @ right.T
        np.testing.assert_allclose(found["w"], want, rtol=1e-3, atol=1e-4)
        squares = (g @ g.T, g.T @ g)
        grams = [0.95 * gram + 0.05 * square for gram, square in zip(grams, squares, strict=True)]
        if not t:
            bases = [np.linalg.eigh(gram)[1][:, ::-1] for gram in grams]
        elif t % 10 == 0:
            pairs = [*zip(grams, bases, strict=True)]
            order = [np.argsort(-np.diag(base.T @ gram @ base)) for gram, base in pairs]
            v = v[order[0]][:, order[1]]
            bases = [
                np.linalg.qr(gram @ base[:, by])[0]
                for (gram, base), by in zip(pairs, order, strict=True)
            ]
