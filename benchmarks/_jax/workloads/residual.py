"""A residual net with batch normalization on the digits, in JAX.

What is trained are the parameters alone: a run carries no averages of the batches' statistics. For
the held-out figure means and variances are taken over all training images at once, layer after
layer, which is what running averages approximate, and the held-out images are normalized by them.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks._jax.workloads.digits import Conv
from benchmarks._jax.workloads.weights import draw_weights
from benchmarks.workloads import Workload
from benchmarks.workloads.digits import CLASSES, Batch, split, workload

WIDTHS = (16, 32)
"""Of the two blocks, the second of stride 2."""

EPOCHS = 20


def _norm(width: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    # Without momentum what it keeps is the last batch's own.
    return nnx.BatchNorm(width, momentum=0.0, use_fast_variance=False, rngs=rngs)


class Block(nnx.Module):
    """Two normalized 3 x 3 convolutions beside a shortcut (He et al. 2015).

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        stride: of the first convolution; where it is not 1 the shortcut is a 1 x 1 convolution.
        rngs: of the layers; the weights are those of `draw_weights`.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs) -> None:
        self.stride = stride
        self.first = Conv(inputs, outputs, stride, use_bias=False, rngs=rngs)
        self.first_norm = _norm(outputs, rngs)
        self.second = Conv(outputs, outputs, use_bias=False, rngs=rngs)
        self.second_norm = _norm(outputs, rngs)
        changed = stride != 1
        self.shortcut = nnx.data(
            nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs) if changed else None
        )
        self.shortcut_norm = nnx.data(_norm(outputs, rngs) if changed else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features, shape `(batch, height / stride, width / stride, outputs)`."""
        y = jax.nn.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x[:, :: self.stride, :: self.stride]))
        return jax.nn.relu(x + y)


class ResNet(nnx.Module):
    """A convolution, two blocks, the mean over the image and a linear layer.

    Args:
        rngs: of the layers; the weights are those of `draw_weights`.
    """

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.stem = Conv(1, WIDTHS[0], use_bias=False, rngs=rngs)
        self.stem_norm = _norm(WIDTHS[0], rngs)
        before = (WIDTHS[0], *WIDTHS)
        self.blocks = nnx.List(
            [
                Block(inputs, outputs, 2 if n else 1, rngs=rngs)
                for n, (inputs, outputs) in enumerate(zip(before, WIDTHS, strict=False))
            ]
        )
        self.out = nnx.Linear(WIDTHS[-1], CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits, float32, shape `(batch, 10)`, of `images`, shape `(batch, 8, 8, 1)`."""
        x = jax.nn.relu(self.stem_norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean((1, 2)))


@functools.cache
def residual() -> Workload:
    """Weights and the order of the images are drawn from the run's seed."""
    data = split()
    abstract = nnx.eval_shape(lambda: ResNet(rngs=nnx.Rngs(0)))
    graph, shapes, statistics = nnx.split(abstract, nnx.Param, nnx.BatchStat)

    def cost(model: ResNet, batch: Batch) -> jax.Array:
        images, labels = batch
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    def net(params: nnx.State) -> ResNet:
        # A forward pass writes its own statistics over these and reads none.
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), statistics)
        return nnx.merge(graph, params, nothing)

    def loss(params: nnx.State, batch: Batch) -> jax.Array:
        return cost(net(params), batch)

    def held_out(params: nnx.State) -> jax.Array:
        model = net(params)
        # As a plain constant the compiler would spend seconds on folding it.
        model(jax.lax.optimization_barrier(jnp.asarray(data.train[0])))
        model.eval()
        return cost(model, data.held_out)

    found = workload(
        "resnet",
        init=lambda seed: draw_weights(shapes, seed, gain=2.0),  # He et al., for ReLU
        loss=loss,
        held_out=held_out,
    )
    per_epoch = found.steps // found.settings["epochs"]
    settings = found.settings | {"epochs": EPOCHS, "statistics": "of all training images"}
    return found._replace(steps=EPOCHS * per_epoch, settings=settings)
