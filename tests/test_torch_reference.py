"""Adam and Lion read a second time, in float64 NumPy from the specification's equations."""

import numpy as np
import pytest

from reference_law import ReferenceMeta3

torch = pytest.importorskip("torch")

from cruxy_torch import CruxyOptimizer  # noqa: E402

STEPS, RATE, DECAY = 100, 0.01, 0.1


def stream():
    rng = np.random.default_rng(0)
    for step in range(STEPS):
        grad = rng.normal(size=(5, 7)) * (20.0 if step == 60 else 0.3)
        yield grad, (np.nan if step % 9 == 4 else 2.0 - 0.01 * step)


def decided(law, grad, loss):
    norm, gamma_norm = np.sqrt((grad**2).sum()), (np.abs(grad) ** 1.5).sum() ** (1 / 1.5)
    controls = law.step(norm, gamma_norm, loss)
    return controls, grad * min(1.0, controls["clip_threshold"] / (norm + 1e-6))


def by_adam(theta, nesterov):
    law, m, v, product1, product2 = ReferenceMeta3(), 0.0, 0.0, 1.0, 1.0
    for grad, loss in stream():
        controls, g = decided(law, grad, loss)
        beta1, beta2, rate = controls["beta1"], controls["beta2"], RATE * controls["rate"]
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        product1, product2 = product1 * beta1, product2 * beta2
        ahead = (beta1 * m + (1 - beta1) * g) / (1 - beta1 * product1)
        numerator = ahead if nesterov else m / (1 - product1)
        u = numerator / (np.sqrt(v / (1 - product2)) + 1e-8)
        theta = theta - rate * (u + DECAY * theta)
    return theta


def by_lion(theta):
    law, m = ReferenceMeta3(), 0.0
    for grad, loss in stream():
        controls, g = decided(law, grad, loss)
        beta1, beta2, rate = controls["beta1"], controls["beta2"], RATE * controls["rate"]
        u = np.sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g
        theta = theta - rate * (u + DECAY * theta)
    return theta


def ours(theta, **options):
    param = torch.nn.Parameter(torch.tensor(theta))
    optimizer = CruxyOptimizer([param], lr=RATE, weight_decay=DECAY, **options)
    for grad, loss in stream():
        param.grad = torch.tensor(grad)
        optimizer.step(loss=loss)
    return param.detach().numpy()


START = np.random.default_rng(1).normal(size=(5, 7))
# The controls are float32 and move each step by up to eight roundings of the rate; a moment carries
# them on, so they add up over the run.
TOLERANCE = STEPS * 8 * 2.0**-24 * RATE * 10


@pytest.mark.parametrize("path", [{}, {"fused": False}, {"foreach": True}])
@pytest.mark.parametrize("nesterov", [True, False])
def test_adam_follows_the_equations(nesterov, path):
    theirs = by_adam(START, nesterov)
    np.testing.assert_allclose(
        ours(START, use_nesterov=nesterov, **path), theirs, rtol=0.0, atol=TOLERANCE
    )


@pytest.mark.parametrize("path", [{}, {"fused": False}, {"foreach": True}])
def test_lion_follows_the_equations(path):
    np.testing.assert_allclose(
        ours(START, use_lion=True, **path), by_lion(START), rtol=0.0, atol=TOLERANCE
    )
