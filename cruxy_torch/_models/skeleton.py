"""A model without weights, from its configuration or from where that lies."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cruxy_control.memory import Model


def needed(module: str, extra: str, what: str) -> Any:
    """Imports an optional package.

    Raises:
        ImportError: where it is absent, with the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what} needs the package {module}, which is not installed; "
            f"pip install 'cruxy-optax[{extra}]'."
        ) from error


def config_of(source: Any, **options: Any) -> Any:
    """The configuration itself, or that which stands under a name or in a folder.

    Raises:
        ImportError: where transformers is not installed.
        OSError: from transformers, where there is no such model.
    """
    if not isinstance(source, str | Path):
        return source
    transformers = needed("transformers", "hf", f"reading {str(source)!r}")
    try:
        return transformers.AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise OSError(
            f"a model must be a folder with a config.json or a name on the hub, got {str(source)!r}"
            "; see what transformers says above, or give a configuration."
        ) from error


def class_of(config: Any) -> Any:
    """The class of a configuration: that which it names, else the one for a causal language model.

    Raises:
        ValueError: where there is none.
    """
    transformers = needed("transformers", "hf", "making a model of a configuration")
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        found = auto._model_mapping.get(type(config), None)
        if found is not None:
            return found[0] if isinstance(found, tuple) else found
    raise ValueError(
        f"a configuration must be one that transformers has a model for, got "
        f"{type(config).__name__}; give the model itself."
    )


def skeleton(source: Any, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model on the `meta` device, whose parameters have shapes and no memory.

    Args:
        source: a configuration of transformers, a folder or a name.
        dtype: of its parameters.
    """
    config = config_of(source)
    kind = class_of(config)
    with torch.device("meta"):
        model = kind(config)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    for param in model.parameters():
        if param.is_floating_point():
            param.data = param.data.to(dtype)
    return model


def sizes_of(model: nn.Module) -> Model:
    """The sizes of a model that decide what it takes in few bits."""
    shared = _embeddings(model)
    linear = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is None or any(weight is other for other in shared):
            continue
        if isinstance(module, nn.Linear):
            linear.append((weight.shape[0], weight.numel() // max(1, weight.shape[0])))
        elif type(module).__name__ == "Conv1D":  # GPT-2's linear layer, which is transposed
            linear.append((weight.shape[1], weight.shape[0]))
    return Model(
        count=sum(p.numel() for p in model.parameters()),
        linear=tuple(linear),
        buffers=sum(b.numel() * b.element_size() for b in model.buffers()),
    )


def _embeddings(model: nn.Module) -> list[Any]:
    """The weights of embeddings and of the output layer, which stay in 16 bits."""
    owners = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    owners += [] if output is None else [output]
    return [owner.weight for owner in owners if getattr(owner, "weight", None) is not None]
