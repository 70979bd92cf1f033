"""Whole optimizers against float64 NumPy, from the gradient to the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cruxy_optax import meta3, meta_lion, stability_v1, stability_v2
from optimizers import at, gradients, train, tree
from reference_law import ReferenceMeta3, ReferenceV1, ReferenceV2

STEPS, RATE, DECAY, EPS = 200, 3e-3, 0.1, 1e-8
# Moments average over up to 1,000 steps' roundings and the update divides them: about ten
# roundings a step add up in the parameters, at random, over 200 steps of size RATE.
TOLERANCE = 10 * STEPS * 2.0**-24
# A float32 beta2 of up to 0.9999 weighs a gradient by 1 - beta2, known to one rounding of beta2.
SECOND_MOMENT = 2.0**-24 / (1 - 0.9999)


class NumpyAdam:
    """Nesterov Adam with decoupled decay, its normalisers the products of the betas used."""

    def __init__(self, params):
        self.m = {k: np.zeros_like(p) for k, p in params.items()}
        self.v = {k: np.zeros_like(p) for k, p in params.items()}
        self.p1 = self.p2 = 1.0

    def direction(self, g, beta1, beta2):
        self.p1, self.p2 = self.p1 * beta1, self.p2 * beta2
        out = {}
        for k in g:
            self.m[k] = beta1 * self.m[k] + (1 - beta1) * g[k]
            self.v[k] = beta2 * self.v[k] + (1 - beta2) * g[k] ** 2
            ahead = (beta1 * self.m[k] + (1 - beta1) * g[k]) / (1 - beta1 * self.p1)
            out[k] = ahead / (np.sqrt(self.v[k] / (1 - self.p2)) + EPS)
        return out


class NumpyLion:
    """The sign of an interpolation, and one momentum."""

    def __init__(self, params):
        self.m = {k: np.zeros_like(p) for k, p in params.items()}

    def direction(self, g, beta1, beta2):
        out = {k: np.sign(beta1 * self.m[k] + (1 - beta1) * g[k]) for k in g}
        for k in g:
            self.m[k] = beta2 * self.m[k] + (1 - beta2) * g[k]
        return out


def numpy_run(law, moments, stacked, losses):
    params = {k: np.asarray(p, np.float64) for k, p in tree().items()}
    moments = moments(params)
    for t in range(STEPS):
        g = {k: np.asarray(x, np.float64) for k, x in at(stacked, t).items()}
        flat = np.concatenate([x.ravel() for x in g.values()])
        norm, gamma_norm = np.sqrt(np.sum(flat**2)), np.sum(np.abs(flat) ** 1.5) ** (1 / 1.5)
        used = law.step(norm, gamma_norm, float(losses[t]))
        if used["rate"] == 0.0:
            continue
        scale = min(1.0, used.get("clip_threshold", np.inf) / (norm + 1e-6))
        g = {k: x * scale for k, x in g.items()}
        for k, u in moments.direction(g, used["beta1"], used["beta2"]).items():
            params[k] = params[k] - RATE * used["rate"] * (u + DECAY * params[k])
    return params, moments


def stream():
    """Gradients with a surge, a spike and a NaN step; a loss is missing now and then."""
    stacked, losses = gradients(STEPS)
    size = jnp.ones(STEPS).at[60:90].set(5.0).at[120].set(1000.0).at[140].set(jnp.nan)
    stacked = jax.tree.map(lambda g: g * size.reshape(-1, *[1] * (g.ndim - 1)), stacked)
    return stacked, losses.at[::17].set(jnp.nan)


ADAMS = {
    "meta3": (meta3, ReferenceMeta3),
    "stability_v1": (stability_v1, ReferenceV1),
    "stability_v2": (stability_v2, ReferenceV2),
}


@pytest.mark.parametrize("name", ADAMS)
def test_adam_modes_equal_float64_numpy(name):
    optimizer, law = ADAMS[name]
    stacked, losses = stream()
    params, state = train(optimizer(RATE, weight_decay=DECAY), tree(), stacked, losses)
    want, moments = numpy_run(law(), NumpyAdam, stacked, losses)
    assert int(state.skipped_total) == 1
    adam = state.inner_state[1]
    for k in want:
        np.testing.assert_allclose(params[k], want[k], rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_allclose(adam.mu[k], moments.m[k], rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_allclose(adam.nu[k], moments.v[k], rtol=SECOND_MOMENT)


def test_lion_equals_float64_numpy():
    stacked, losses = stream()
    params, state = train(meta_lion(RATE, weight_decay=DECAY), tree(), stacked, losses)

    class Lion(ReferenceMeta3):
        """The slow loop on b2 = 0.99 instead of 0.999."""

        def __init__(self):
            super().__init__()
            self.beta2 = 0.99

    want, moments = numpy_run(Lion(), NumpyLion, stacked, losses)
    for k in want:
        np.testing.assert_allclose(params[k], want[k], rtol=TOLERANCE, atol=TOLERANCE)
        mu = state.inner_state[1].mu[k]
        np.testing.assert_allclose(mu, moments.m[k], rtol=TOLERANCE, atol=TOLERANCE)
