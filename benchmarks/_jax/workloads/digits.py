"""Small image classifiers in JAX: a convolutional net and a vision transformer."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.workloads import Workload
from benchmarks.workloads.digits import CLASSES, PATCH, SIDE, Batch, split, workload


class Conv(nnx.Conv):
    """A 3 x 3 convolution as one matrix product, for which XLA on CPU needs a tenth of the time."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int = 1,
        *,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            inputs,
            outputs,
            kernel_size=(3, 3),
            padding=1,
            strides=stride,
            use_bias=use_bias,
            rngs=rngs,
        )
        self.stride = stride

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features, shape `(batch, height / stride, width / stride, outputs)`."""
        batch, height, width, _ = images.shape
        padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [
            padded[:, row : row + height : self.stride, column : column + width : self.stride]
            for row in range(3)
            for column in range(3)
        ]
        kernel = self.kernel[...]
        rows = jnp.concatenate(shifted, axis=-1).reshape(-1, kernel[..., 0].size)
        features = rows @ kernel.reshape(-1, kernel.shape[-1])
        if self.bias is not None:
            features = features + self.bias[...]
        return features.reshape(batch, height // self.stride, width // self.stride, -1)


class ConvNet(nnx.Module):
    """Three 3 x 3 convolutions, the last two of stride 2, and a linear layer on their output.

    Args:
        rngs: draws the initial weights.
    """

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.first = Conv(1, 16, rngs=rngs)
        self.second = Conv(16, 32, stride=2, rngs=rngs)
        self.third = Conv(32, 64, stride=2, rngs=rngs)
        self.out = nnx.Linear(64 * (SIDE // 4) ** 2, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits, float32, shape `(batch, 10)`, of `images`, shape `(batch, 8, 8, 1)`."""
        x = images
        for layer in (self.first, self.second, self.third):
            x = jax.nn.gelu(layer(x))
        return self.out(x.reshape(x.shape[0], -1))


class Block(nnx.Module):
    """Self-attention, then a GELU layer four times as wide; both pre-norm and residual."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention_in = nnx.Linear(width, 3 * width, rngs=rngs)
        self.attention_out = nnx.Linear(width, width, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.mlp_in = nnx.Linear(width, 4 * width, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The residual stream, shape `(batch, patches, width)`, one block on."""
        batch, patches, width = x.shape
        qkv = self.attention_in(self.attention_norm(x))
        qkv = qkv.reshape(batch, patches, 3, self.heads, width // self.heads)
        attended = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0))
        x = x + self.attention_out(attended.reshape(batch, patches, width))
        return x + self.mlp_out(jax.nn.gelu(self.mlp_in(self.mlp_norm(x))))


class ViT(nnx.Module):
    """A vision transformer (Dosovitskiy et al. 2020) on four patches, whose outputs are averaged.

    Args:
        width: length of a patch's vector.
        heads: attention heads, dividing `width`.
        layers: transformer blocks.
        rngs: draws the initial weights.
    """

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2, *, rngs: nnx.Rngs) -> None:
        self.patches = nnx.Linear(PATCH**2, width, rngs=rngs)
        init = jax.nn.initializers.normal(0.02)
        self.positions = nnx.Embed((SIDE // PATCH) ** 2, width, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.out = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits, float32, shape `(batch, 10)`, of `images`, shape `(batch, 8, 8, 1)`."""
        rows = SIDE // PATCH
        x = images.reshape(-1, rows, PATCH, rows, PATCH).swapaxes(2, 3)
        x = self.patches(x.reshape(-1, rows**2, PATCH**2)) + self.positions.embedding[...]
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x).mean(1))


MODELS: dict[str, Callable[..., nnx.Module]] = {"conv": ConvNet, "vit": ViT}


@functools.cache
def digits(model: str) -> Workload:
    """A classifier; its weights and the order of the images are drawn from the run's seed.

    Args:
        model: a key of `MODELS`.
    """
    make = MODELS[model]
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    kept = split().held_out

    @jax.jit
    def init(seed: int | jax.Array) -> nnx.State:
        return nnx.state(make(rngs=nnx.Rngs(jax.random.key(seed))), nnx.Param)

    def loss(params: nnx.State, batch: Batch) -> jax.Array:
        images, labels = batch
        logits = nnx.merge(graph, params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return workload(model, init=init, loss=loss, held_out=lambda params: loss(params, kept))
