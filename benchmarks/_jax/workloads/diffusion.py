"""A small diffusion model of the digits in JAX: it predicts the noise added to an image."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks._jax.workloads.weights import draw_weights
from benchmarks.workloads import Workload
from benchmarks.workloads.digits import BATCH, EPOCHS, SIDE, split

Noised = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Images, float32, shape `(batch, 64)`; times in [0, 1), `(batch,)`; noise like the images."""

PIXELS = SIDE**2
WIDTH = 128
FREQUENCIES = 8

DRAWS = 4
"""Times and noises for every held-out image, the same in every run."""


def noised(images: np.ndarray, rng: np.random.Generator) -> Noised:
    """Images with a time and a noise drawn for each."""
    count = len(images)
    times = rng.random(count, np.float32)
    return images, times, rng.standard_normal((count, PIXELS), np.float32)


class Denoiser(nnx.Module):
    """A multilayer perceptron with two residual blocks, told the time by sines and cosines.

    Args:
        rngs: of the layers; the weights are those of `draw_weights`.
    """

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.image = nnx.Linear(PIXELS, WIDTH, rngs=rngs)
        self.time = nnx.Linear(2 * FREQUENCIES, WIDTH, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.into = nnx.List([nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs) for _ in range(2)])
        self.back = nnx.List([nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs) for _ in range(2)])
        self.out = nnx.Linear(WIDTH, PIXELS, rngs=rngs)

    def __call__(self, images: jax.Array, times: jax.Array) -> jax.Array:
        """The noise in `images`, shape `(batch, 64)`, at `times`, shape `(batch,)`."""
        angles = times[:, None] * (jnp.pi / 2 * 2.0 ** jnp.arange(FREQUENCIES))
        told = self.time(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1))
        x = self.image(images) + told
        for norm, into, back in zip(self.norms, self.into, self.back, strict=True):
            x = x + back(jax.nn.gelu(into(norm(x))))
        return self.out(x)


@functools.cache
def diffusion() -> Workload:
    """Weights, the order of the images, times and noises are drawn from the run's seed.

    At time `t` the model sees `cos(pi t / 2) image + sin(pi t / 2) noise`. The figure is the mean
    squared error of the noise it finds, where 1 is what finding nothing gives.

    References:
        Ho et al., [Denoising diffusion probabilistic models](https://arxiv.org/abs/2006.11239),
        2020, equation 14; Nichol and Dhariwal, 2021, for the cosine.
    """
    data = split()
    images, held_out = (part[0].reshape(-1, PIXELS) for part in data)
    kept = noised(np.repeat(held_out, DRAWS, axis=0), np.random.default_rng(0))
    per_epoch = len(images) // BATCH
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Denoiser(rngs=nnx.Rngs(0))))

    def loss(params: nnx.State, batch: Noised) -> jax.Array:
        clean, times, noise = batch
        angles = jnp.pi / 2 * times[:, None]
        seen = jnp.cos(angles) * clean + jnp.sin(angles) * noise
        return ((nnx.merge(graph, params)(seen, times) - noise) ** 2).mean()

    def batches(seed: int) -> Iterator[Noised]:
        rng = np.random.default_rng(seed)
        while True:
            for drawn in rng.permutation(len(images))[: per_epoch * BATCH].reshape(-1, BATCH):
                yield noised(images[drawn], rng)

    return Workload(
        name="digits-diffusion",
        steps=EPOCHS * per_epoch,
        unit="held-out squared error of the noise",
        init=lambda seed: draw_weights(shapes, seed),
        loss=loss,
        batches=batches,
        held_out=lambda params: loss(params, kept),
        settings={
            "data": "scikit-learn's digits",
            "model": "denoiser",
            "train": len(images),
            "held_out": len(held_out),
            "draws": DRAWS,
            "width": WIDTH,
            "batch": BATCH,
            "epochs": EPOCHS,
        },
    )
