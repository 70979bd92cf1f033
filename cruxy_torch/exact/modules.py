"""Exact layers as modules, with the parameters of their namesakes in `torch.nn`."""

from typing import Any

import torch
from torch import Tensor, nn

from cruxy_exact.attention import rotary_table
from cruxy_exact.random_bits import stream_key
from cruxy_torch.exact import functional


class Linear(nn.Linear):
    """`torch.nn.Linear` with exact products; arguments as there.

    Examples:
        >>> import torch
        >>> from cruxy_torch import exact
        >>> layer = exact.Linear(3, 2)
        >>> layer(torch.ones(4, 3)).shape
        torch.Size([4, 2])
    """

    def forward(self, input: Tensor) -> Tensor:
        """`input` is `[..., in_features]`, float32."""
        return functional.linear(input, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last axis, with weight and bias; arguments as there.

    Raises:
        ValueError: where more than one axis is normalized, or weight or bias is left out.
    """

    def __init__(self, normalized_shape: Any, *args: Any, **options: Any) -> None:
        super().__init__(normalized_shape, *args, **options)
        if len(self.normalized_shape) != 1 or self.weight is None or self.bias is None:
            raise ValueError(
                "exact.LayerNorm needs one axis, a weight and a bias, got "
                f"{self.extra_repr()}; reshape, or freeze a bias of zeros."
            )

    def forward(self, input: Tensor) -> Tensor:
        """`input` is `[..., D]`, float32."""
        return functional.layer_norm(input, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last axis, with a weight; arguments as there.

    Raises:
        ValueError: where more than one axis is normalized, or the weight is left out.
    """

    def __init__(self, normalized_shape: Any, *args: Any, **options: Any) -> None:
        super().__init__(normalized_shape, *args, **options)
        if len(self.normalized_shape) != 1 or self.weight is None:
            raise ValueError(
                f"exact.RMSNorm needs one axis and a weight, got {self.extra_repr()}; reshape."
            )

    def forward(self, x: Tensor) -> Tensor:
        """`x` is `[..., D]`, float32."""
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        return functional.rms_norm(x, self.weight, eps)


class Embedding(nn.Embedding):
    """`torch.nn.Embedding`, whose gradients are added exactly; arguments as there.

    Raises:
        ValueError: where `padding_idx`, `max_norm`, `scale_grad_by_freq` or `sparse` is given.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        special = (self.padding_idx, self.max_norm, self.scale_grad_by_freq, self.sparse)
        if any(value is not None and value is not False for value in special):
            raise ValueError(
                "exact.Embedding takes no padding_idx, max_norm, scale_grad_by_freq or sparse, got "
                f"{self.extra_repr()}; leave them out."
            )

    def forward(self, input: Tensor) -> Tensor:
        """`input` is whole numbers of any shape."""
        return functional.embedding(input, self.weight)


class Dropout(nn.Module):
    """Dropout whose random bits depend on the step, the seed and the layer's number alone.

    Call `set_step(model, step)` before each training step; a mask that depended on how often
    `forward` was called would be another one when a checkpointed block is run again.

    Args:
        p: the share that is dropped, rounded to 256ths; in `[0, 1)`.
        layer: tells the dropouts of a model apart; `convert_` numbers them. A grain takes
            sixty-four numbers: the 65th takes `cruxy_exact.random_bits.layer_number(64)`.
        seed: tells runs apart.

    Raises:
        ValueError: where `p` is none of these.
    """

    key: Tensor

    def __init__(self, p: float = 0.5, layer: int = 0, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p must be in [0, 1), got {p!r}; 0 drops nothing.")
        self.p, self.layer, self.seed = p, layer, seed
        self.is_set = False
        self.register_buffer(
            "key", torch.zeros((), dtype=torch.int32, device="cpu"), persistent=False
        )

    def set_step(self, step: int | Tensor, grain: int = 0) -> None:
        """Draws the random bits of a step, and of a grain in it."""
        step = torch.zeros_like(self.key) + step
        self.key = stream_key(step, self.seed, self.layer + 64 * grain, xp=torch)
        self.is_set = True

    def extra_repr(self) -> str:
        """The arguments."""
        return f"p={self.p}, layer={self.layer}, seed={self.seed}"

    def forward(self, input: Tensor) -> Tensor:
        """`input` is float32 of any shape.

        Raises:
            RuntimeError: in training, where no step was set.
        """
        if not self.training or not self.p:
            return input
        if not self.is_set:
            raise RuntimeError(
                "exact.Dropout draws its bits from the number of the step, and none was set; call "
                "exact.set_step(model, step) before each training step."
            )
        return functional.dropout(input, self.key, self.p)


def set_step(model: nn.Module, step: int | Tensor, grain: int = 0) -> None:
    """Draws the random bits of every `Dropout` in a model for a step.

    Args:
        model: the model.
        step: its number from 0; an int or an int32 tensor `()`.
        grain: the number of the grain in the whole batch, where gradients are accumulated.
    """
    for module in model.modules():
        if isinstance(module, Dropout):
            module.set_step(step, grain)


class GELU(nn.GELU):
    """`torch.nn.GELU`; `approximate="tanh"` is quicker."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` is float32 of any shape."""
        return functional.gelu(input, self.approximate)


class SiLU(nn.Module):
    """`torch.nn.SiLU`."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` is float32 of any shape."""
        return functional.silu(input)


class ReLU(nn.Module):
    """`torch.nn.ReLU`."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` is float32 of any shape."""
        return functional.relu(input)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` by unfolding; stride and kernel alike make a patch embedding.

    Raises:
        ValueError: where it is dilated, grouped, or padded by anything but zeros in numbers.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        plain = self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros"
        if not plain or isinstance(self.padding, str):
            raise ValueError(
                "exact.Conv2d takes no groups, dilation, padding_mode or padding by name, got "
                f"{self.extra_repr()}; leave them out."
            )

    def forward(self, input: Tensor) -> Tensor:
        """`input` is `[B, C, H, W]`, float32."""
        stride, padding = self.stride, self.padding
        return functional.conv2d(input, self.weight, self.bias, stride, padding)  # pyright: ignore


class Attention(nn.Module):
    """Self-attention with one linear layer for queries, keys and values.

    Args:
        embed_dim: width of the input and the output.
        num_heads: heads of the queries; divides `embed_dim`.
        kv_heads: heads of keys and values, which serve queries in groups; `num_heads` at first.
        bias: whether both linear layers have one.
        causal: whether a query sees nothing after it.
        rotary_base: of rotary positions; `None` for none.

    Raises:
        ValueError: where the heads do not divide.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kv_heads: int | None = None,
        *,
        bias: bool = True,
        causal: bool = False,
        rotary_base: float | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if kv_heads is None else kv_heads
        if embed_dim % num_heads or num_heads % kv_heads:
            raise ValueError(
                "num_heads must divide embed_dim and kv_heads num_heads, got "
                f"{embed_dim}, {num_heads} and {kv_heads}; use powers of two."
            )
        self.heads, self.kv_heads, self.causal = num_heads, kv_heads, causal
        self.width, self.rotary_base = embed_dim // num_heads, rotary_base
        self.qkv = Linear(embed_dim, (num_heads + 2 * kv_heads) * self.width, bias=bias)
        self.out = Linear(embed_dim, embed_dim, bias=bias)
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`x` is `[B, T, embed_dim]`; `mask` as in `scaled_dot_product_attention`."""
        b, t, _ = x.shape
        parts = self.qkv(x).view(b, t, -1, self.width).transpose(1, 2)
        q, k, v = parts.split((self.heads, self.kv_heads, self.kv_heads), 1)
        if self.rotary_base is not None:
            table = self._table(t, x.device)
            q, k = functional.rotary(q, *table), functional.rotary(k, *table)
        y = functional.scaled_dot_product_attention(q, k, v, mask, self.causal)
        return self.out(y.transpose(1, 2).reshape(b, t, -1))

    def _table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        found = self._tables.get((length, device))
        if found is None:
            base = self.rotary_base or 1.0
            cosine, sine = rotary_table(length, self.width, base)
            options = {"dtype": torch.float32, "device": device}
            found = torch.tensor(cosine, **options), torch.tensor(sine, **options)
            self._tables[length, device] = found
        return found
