"""Exact layers as Flax nnx modules, with the parameters of their namesakes in Flax."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cruxy_control.checks import check_count, check_range
from cruxy_exact.engines import DEFAULT, Precision
from cruxy_optax.exact import _attention as attention
from cruxy_optax.exact import _functional as functional
from cruxy_optax.exact._initial import Initializer, normal_init, uniform_init
from cruxy_optax.exact._state_dict import load_state_dict, state_dict

__all__ = [
    "Attention",
    "Conv",
    "Dropout",
    "Embed",
    "LayerNorm",
    "Linear",
    "PatchEmbedding",
    "RMSNorm",
    "load_state_dict",
    "normal_init",
    "state_dict",
    "uniform_init",
]

_UNIFORM, _NORMAL = uniform_init(), normal_init(0.02)


class Linear(nnx.Module):
    """`flax.nnx.Linear` with exact products and an exact bias.

    Args:
        in_features: of the input.
        out_features: of the output.
        use_bias: whether one is added.
        kernel_init: of the kernel, `[in_features, out_features]`.
        precision: of the products; see `exact.matmul`.
        rngs: for the initial values.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from cruxy_optax import exact
        >>> layer = exact.nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((4, 3))).shape
        (4, 2)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        kernel_init: Initializer = _UNIFORM,
        precision: Precision = DEFAULT,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.precision = precision
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32)) if use_bias else nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` is `[..., in_features]`, float32."""
        return functional.linear(x, self.kernel[...], _value(self.bias), precision=self.precision)


def _value(param: Any) -> Any:
    return None if param is None else param[...]


class LayerNorm(nnx.Module):
    """`flax.nnx.LayerNorm` over the last axis, with scale and bias.

    Args:
        num_features: of the last axis.
        epsilon: added to the variance; 1e-6 as in Flax, where PyTorch has 1e-5.
        rngs: taken as Flax's layers do, and not used.
    """

    def __init__(
        self, num_features: int, *, epsilon: float = 1e-6, rngs: nnx.Rngs | None = None
    ) -> None:
        del rngs
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(num_features, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(num_features, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` is `[..., num_features]`, float32."""
        return functional.layer_norm(x, self.scale[...], self.bias[...], eps=self.epsilon)


class RMSNorm(nnx.Module):
    """`flax.nnx.RMSNorm` over the last axis, with a scale.

    Args:
        num_features: of the last axis.
        epsilon: added to the mean square.
        rngs: taken as Flax's layers do, and not used.
    """

    def __init__(
        self, num_features: int, *, epsilon: float = 1e-6, rngs: nnx.Rngs | None = None
    ) -> None:
        del rngs
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(num_features, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` is `[..., num_features]`, float32."""
        return functional.rms_norm(x, self.scale[...], eps=self.epsilon)


class Embed(nnx.Module):
    """`flax.nnx.Embed`, the gradients of whose rows are added exactly.

    Args:
        num_embeddings: rows.
        features: of a row.
        embedding_init: of the table.
        rngs: for the initial values.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        embedding_init: Initializer = _NORMAL,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_embeddings, self.features = num_embeddings, features
        self.embedding = nnx.Param(embedding_init(rngs.params(), (num_embeddings, features)))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """`ids` are whole numbers from 0 to `num_embeddings - 1`, of any shape."""
        return functional.embed(self.embedding[...], ids)


class Dropout(nnx.Module):
    """Dropout whose random bits depend on the step, the seed and the layer's number alone.

    They are those of `cruxy_torch.exact.Dropout`. `model.eval()` switches it off, `model.train()`
    on.

    Args:
        rate: the share that is dropped, rounded to 256ths; in `[0, 1)`.
        layer: tells the dropouts of a model apart.
        seed: tells runs apart.
        deterministic: whether nothing is dropped.

    Raises:
        ValueError: where `rate` or `layer` is none of these.
    """

    def __init__(
        self, rate: float, layer: int, seed: int = 0, *, deterministic: bool = False
    ) -> None:
        remedy = "0 drops nothing"
        self.rate = check_range("rate", rate, 0.0, 1.0, upper_open=True, remedy=remedy)
        self.layer = check_count("layer", layer, 0, remedy="number the dropouts of the model")
        self.seed, self.deterministic = seed, deterministic

    def __call__(self, x: jax.Array, step: Any = None, grain: Any = 0) -> jax.Array:
        """Drops elements.

        Args:
            x: float32, any shape.
            step: the number of the step; an int or an int32 array `()`.
            grain: the number of the grain in the whole batch, where gradients are accumulated.

        Raises:
            ValueError: where something is dropped and no step is given.
        """
        if self.deterministic or not self.rate:
            return x
        if step is None:
            raise ValueError(
                "exact dropout draws its bits from the number of the step, but got step=None; pass "
                "it, or call model.eval()."
            )
        key = functional.dropout_key(step, self.layer, seed=self.seed, grain=grain)
        return functional.dropout(x, key, self.rate)


class Conv(nnx.Module):
    """A two-dimensional `flax.nnx.Conv` by unfolding.

    Args:
        in_features: channels of the input.
        out_features: of the output.
        kernel_size: `(kh, kw)`.
        strides: steps between patches.
        padding: zeros on either side of both axes.
        use_bias: whether one is added.
        kernel_init: of the kernel, `[kh, kw, in_features, out_features]`.
        precision: of the products; see `exact.matmul`.
        rngs: for the initial values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: tuple[int, int],
        strides: tuple[int, int] = (1, 1),
        *,
        padding: tuple[int, int] = (0, 0),
        use_bias: bool = True,
        kernel_init: Initializer = _UNIFORM,
        precision: Precision = DEFAULT,
        rngs: nnx.Rngs,
    ) -> None:
        self.strides, self.padding = tuple(strides), tuple(padding)
        self.precision = precision
        shape = (*kernel_size, in_features, out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32)) if use_bias else nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` is `[B, H, W, in_features]`, float32."""
        options = {"stride": self.strides, "padding": self.padding, "precision": self.precision}
        return functional.convolution(x, self.kernel[...], _value(self.bias), **options)


class PatchEmbedding(Conv):
    """The patches of images as rows, as of a vision transformer: `[B, patches, out_features]`.

    Args:
        in_features: channels of the image.
        out_features: of a row.
        patch_size: `(kh, kw)`, which have to divide the image.
        use_bias: whether one is added.
        kernel_init: of the kernel.
        precision: of the products; see `exact.matmul`.
        rngs: for the initial values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        patch_size: tuple[int, int],
        *,
        use_bias: bool = True,
        kernel_init: Initializer = _UNIFORM,
        precision: Precision = DEFAULT,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            patch_size,
            patch_size,
            use_bias=use_bias,
            kernel_init=kernel_init,
            precision=precision,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` is `[B, H, W, in_features]`, float32."""
        kernel, bias = self.kernel[...], _value(self.bias)
        return functional.patch_embedding(x, kernel, bias, precision=self.precision)


class Attention(nnx.Module):
    """Self-attention: fused or separate layers for queries, keys and values, grouped, rotary.

    Args:
        num_heads: heads of the queries; divides `features`.
        features: width of the input and the output.
        kv_heads: heads of keys and values, which serve queries in groups; `None` for `num_heads`.
        fused: one linear layer `qkv`, as in `cruxy_torch.exact.Attention`, or three, `query`, `key`
            and `value`. The gradient of the input is one product or the exact sum of three.
        causal: whether a query sees nothing after it.
        rotary_base: of rotary positions; `None` for none.
        use_bias: whether the linear layers have one.
        kernel_init: of their kernels.
        precision: of the products; see `exact.matmul`.
        rngs: for the initial values.

    Raises:
        ValueError: where the heads do not divide.
    """

    def __init__(
        self,
        num_heads: int,
        features: int,
        *,
        kv_heads: int | None = None,
        fused: bool = True,
        causal: bool = False,
        rotary_base: float | None = None,
        use_bias: bool = True,
        kernel_init: Initializer = _UNIFORM,
        precision: Precision = DEFAULT,
        rngs: nnx.Rngs,
    ) -> None:
        kv_heads = num_heads if kv_heads is None else kv_heads
        if features % num_heads or num_heads % kv_heads:
            raise ValueError(
                "num_heads must divide features and kv_heads num_heads, got "
                f"{num_heads}, {features} and {kv_heads}; use powers of two."
            )
        self.num_heads, self.kv_heads, self.width = num_heads, kv_heads, features // num_heads
        self.fused, self.causal, self.rotary_base = fused, causal, rotary_base
        self.precision = precision

        def layer(out_features: int) -> Linear:
            return Linear(
                features,
                out_features,
                use_bias=use_bias,
                kernel_init=kernel_init,
                precision=precision,
                rngs=rngs,
            )

        if fused:
            self.qkv = layer((num_heads + 2 * kv_heads) * self.width)
        else:
            self.query = layer(features)
            self.key, self.value = layer(kv_heads * self.width), layer(kv_heads * self.width)
        self.out = layer(features)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """`x` is `[B, T, features]`, float32; `mask` as in `exact.attention`."""
        b, t, features = x.shape
        q, k, v = self._heads(x)
        if self.rotary_base is not None:
            table = attention.rotary_table(t, self.width, self.rotary_base)
            q, k = attention.rotary(q, *table), attention.rotary(k, *table)
        options = {"causal": self.causal, "precision": self.precision}
        y = attention.attention(q, k, v, mask, **options)
        return self.out(jnp.swapaxes(y, 1, 2).reshape(b, t, features))

    def _heads(self, x: jax.Array) -> tuple[jax.Array, ...]:
        def heads(y: jax.Array) -> jax.Array:
            return jnp.swapaxes(y.reshape(*y.shape[:2], -1, self.width), 1, 2)

        if self.fused:
            ends = (self.num_heads, self.num_heads + self.kv_heads)
            return tuple(jnp.split(heads(self.qkv(x)), ends, axis=1))
        layers = (self.query, self.key, self.value)
        return tuple(
            heads(layer(copy)) for layer, copy in zip(layers, functional.fork(x, 3), strict=True)
        )
