"""The task of the short examples: which of two spirals is a point on?"""

import numpy as np


def spirals(count: int = 512, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points of two interleaved spirals, float32 of shape `(count, 2)`, and their classes, 0 or 1.

    Args:
        count: points in all, in an order without a pattern.
        seed: of where the points are on their spirals.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % 2)
    radius = np.sqrt(rng.random(count))
    angle = 6.0 * radius + np.pi * labels
    points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return points.astype(np.float32), labels.astype(np.float32)
