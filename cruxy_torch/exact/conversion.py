"""Models made exact, and graphs checked for what is not."""

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from cruxy_exact.random_bits import layer_number
from cruxy_torch.exact import modules

_SAME = (
    nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Flatten, nn.Unflatten,
    nn.ParameterList, nn.ParameterDict,
)  # fmt: skip
"""Modules that compute nothing."""
_EXACT = (
    modules.Attention, modules.Conv2d, modules.Dropout, modules.Embedding, modules.GELU,
    modules.LayerNorm, modules.Linear, modules.RMSNorm, modules.ReLU, modules.SiLU,
)  # fmt: skip


def convert_(
    model: nn.Module, *, allow: Collection[type[nn.Module]] = (), seed: int = 0
) -> nn.Module:
    """Swaps the layers of a model for exact ones, in place; parameters stay what they are.

    It knows `Linear`, `LayerNorm`, `RMSNorm`, `Embedding`, `Dropout`, `GELU`, `SiLU`, `ReLU` and
    `Conv2d`. What a module of your own does in its `forward` besides calling these has to be made
    of functions of `exact`: say so with `allow`, and let `check_graph` look at a loss.

    Args:
        model: the model.
        allow: classes of modules to take as they are.
        seed: of the dropouts.

    Returns:
        The model, or the exact layer where it is one itself.

    Raises:
        TypeError: where it contains a module that it does not know, which is named. The model is
            then as it was.
        ValueError: where a layer has an option that its exact one lacks.

    Examples:
        >>> from torch import nn
        >>> from cruxy_torch import exact
        >>> exact.convert_(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)))
        Sequential(
          (0): Linear(in_features=3, out_features=4, bias=True)
          (1): GELU(approximate='none')
          (2): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    new: dict[int, nn.Module] = {}
    dropouts = 0
    for name, module in model.named_modules():
        if type(module) in _EXACT or isinstance(module, (*_SAME, *allow)):
            continue
        make = _MAKERS.get(type(module))
        if make is None:
            raise TypeError(
                f"{name or 'the model'} is a {type(module).__name__}, which exact knows no layer "
                "for; replace it, or pass allow=[its class] if it computes nothing of its own."
            )
        new[id(module)] = made = make(module)
        if isinstance(made, modules.Dropout):
            made.layer, made.seed = layer_number(dropouts), seed
            dropouts += 1
        made.train(module.training)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves repeats out
            if id(child) in new:
                setattr(parent, name, new[id(child)])
    return new.get(id(model), model)


def _like(made: nn.Module, module: nn.Module) -> nn.Module:
    """A module of another class with the parameters of this one, the very same."""
    made.__dict__.update(module.__dict__)
    return made


def _remade(cls: type[nn.Module], *arguments: str) -> Callable[[Any], nn.Module]:
    def make(module: Any) -> nn.Module:
        options = {name: getattr(module, name) for name in arguments}
        if "bias" in options:
            options["bias"] = options["bias"] is not None
        return _like(cls(**options, device="meta"), module)

    return make


_MAKERS: dict[type, Callable[[Any], nn.Module]] = {
    nn.Linear: _remade(modules.Linear, "in_features", "out_features", "bias"),
    nn.LayerNorm: _remade(
        modules.LayerNorm, "normalized_shape", "eps", "elementwise_affine", "bias"
    ),
    nn.RMSNorm: _remade(modules.RMSNorm, "normalized_shape", "eps", "elementwise_affine"),
    nn.Embedding: _remade(
        modules.Embedding, "num_embeddings", "embedding_dim", "padding_idx", "max_norm",
        "scale_grad_by_freq", "sparse",
    ),
    nn.Conv2d: _remade(
        modules.Conv2d, "in_channels", "out_channels", "kernel_size", "stride", "padding",
        "dilation", "groups", "bias", "padding_mode",
    ),
    nn.Dropout: lambda module: modules.Dropout(module.p),
    nn.GELU: lambda module: modules.GELU(module.approximate),
    nn.SiLU: lambda module: modules.SiLU(),
    nn.ReLU: lambda module: modules.ReLU(),
}  # fmt: skip

_FREE = (
    "ExactBackward", "AccumulateGrad", "ViewBackward", "TransposeBackward", "PermuteBackward",
    "TBackward", "ReshapeAliasBackward", "UnsafeViewBackward", "SliceBackward", "SelectBackward",
    "UnsqueezeBackward", "SqueezeBackward", "CatBackward", "StackBackward", "SplitBackward",
    "SplitWithSizesBackward", "UnbindBackward", "CloneBackward", "AliasBackward", "FlipBackward",
    "ViewAsBackward", "CheckpointFunctionBackward", "AsStridedBackward", "ErrorBackward",
)  # fmt: skip
"""What moves numbers and changes none."""


def check_graph(loss: Tensor) -> None:
    """Raises where the graph of a loss holds anything that is not exact.

    Args:
        loss: before `backward`.

    Raises:
        ValueError: where an operation is none of `exact`, or a tensor is used three times or more
            without `fork`. Slices of one tensor count as uses: split it at once.
    """
    uses: Counter[Any] = Counter()
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name().rpartition("::")[2].rstrip("0123456789")
        if not name.endswith(_FREE):
            raise ValueError(
                f"the graph holds {node.name()}, which is not exact; use a function of exact."
            )
        for below, index in node.next_functions:
            if below is not None:
                uses[below, index] += 1
                waiting.append(below)
    for (node, _), count in uses.items():
        if count > 2:
            variable = getattr(node, "variable", None)
            what = f"a parameter of shape {tuple(variable.shape)}" if variable is not None else (
                f"a result of {node.name()}"
            )  # fmt: skip
            raise ValueError(
                f"{what} is used {count} times, and the sum of their gradients depends on its "
                "order; pass it through exact.fork."
            )
