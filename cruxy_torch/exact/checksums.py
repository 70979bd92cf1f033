"""The checksum of a model or of any tree of tensors."""

from typing import Any

import torch
from torch import nn

from cruxy_exact import checksum as core
from cruxy_torch.exact import _settings


def checksum(tree: Any, *, grain: int | None = None) -> str:
    """16 hexadecimal digits that stand for every bit of a model.

    The same numbers under the same names have the same checksum as a tree of JAX's arrays or
    NumPy's, wherever they lie. It covers the bits of products that `use` has set.

    Args:
        tree: a module, whose `state_dict` is taken; or mappings, lists and tuples of tensors.
        grain: samples in a grain; `None` where gradients were not accumulated in grains.

    Raises:
        TypeError: where a tensor is not float32.

    Examples:
        >>> import torch
        >>> from cruxy_torch import exact
        >>> exact.checksum({"w": torch.ones(2, 3)})
        '...'
    """
    tree = tree.state_dict() if isinstance(tree, nn.Module) else tree
    return core.checksum(tree, bits=_settings.use().bits, grain=grain, xp=torch)
