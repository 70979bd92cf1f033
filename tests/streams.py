"""Streams of (norm, loss) that laws and optimizers of every framework are held together on."""

import numpy as np

STEPS = 2000


def clean(steps: int = STEPS, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Norm, gamma norm and loss of a run that learns: falling loss, noisy slowly falling norm."""
    rng = np.random.default_rng(seed)
    t = np.arange(steps)
    norm = (0.4 + 2.0 * np.exp(-t / 400)) * rng.lognormal(0.0, 0.35, steps)
    gamma_norm = norm * rng.uniform(2.0, 2.5, steps)
    loss = 1.5 + 2.5 * np.exp(-t / 300) + rng.normal(0.0, 0.05, steps)
    return tuple(x.astype(np.float32).astype(np.float64) for x in (norm, gamma_norm, loss))


def rough(steps: int = STEPS, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same with surges, spikes, zero gradients, NaN and infinite norms, and missing losses."""
    norm, gamma_norm, loss = clean(steps, seed)
    rng = np.random.default_rng(seed + 1)
    for start in range(150, steps, 400):
        norm[start : start + 30] *= 4.0
        gamma_norm[start : start + 30] *= 4.0
    spikes = rng.choice(steps, steps // 50, replace=False)
    norm[spikes] *= 1000.0
    gamma_norm[spikes] *= 1000.0
    zeros = rng.choice(steps, steps // 100, replace=False)
    norm[zeros], gamma_norm[zeros] = 0.0, 0.0
    loss[rng.choice(steps, steps // 20, replace=False)] = np.nan
    loss[rng.choice(steps, steps // 200, replace=False)] = 1e30
    bad = rng.choice(steps, steps // 50, replace=False)
    norm[bad[::2]] = np.nan
    gamma_norm[bad[1::2]] = np.inf
    return norm, gamma_norm, loss


STREAMS = {"clean": clean, "rough": rough}
