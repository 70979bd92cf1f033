"""What the axes of a kernel are: those that count layers and experts, inputs, outputs."""

import fnmatch
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cruxy_optax._roles.parameters import Labelled, Leaf, labelled

Matrices = tuple[int, int, int]
"""How many matrices a kernel is, and their inputs and outputs."""


def check_stacked(stacked: Any) -> tuple[str, ...]:
    """Raises unless these are several patterns; returns them.

    Raises:
        TypeError: where it is a text, which would count letter by letter, or holds no texts.
    """
    if isinstance(stacked, str):
        raise TypeError(
            f"stacked must be a sequence of patterns, got {stacked!r}; write ({stacked!r},)."
        )
    patterns = tuple(stacked)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"stacked must hold shell patterns for dotted paths, got {pattern!r}; for instance "
                '("layers.*",).'
            )
    return patterns


def check_matched(tree: Labelled, stacked: Sequence[str]) -> None:
    """Raises unless every pattern is that of a parameter, here or in other hands.

    Raises:
        ValueError: with the pattern and some of the paths that there are.
    """
    names = [leaf.name for leaf in tree.leaves]
    for pattern in stacked:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"a pattern of stacked must match the path of a parameter, got {pattern!r}; there "
                f"are {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}."
            )


def stacked_axes(leaf: Leaf, stacked: Sequence[str]) -> int:
    """How many of its first axes count layers."""
    return int(any(fnmatch.fnmatchcase(leaf.name, pattern) for pattern in stacked))


def matrices(stacked: Sequence[str] = ()) -> Any:
    """A mask: where a leaf has at least two axes beside that which counts layers."""

    def mask(params: Any) -> Any:
        if not stacked:
            return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)
        leaves = labelled(params, None, ()).present
        found = [len(leaf.parameter.shape) - stacked_axes(leaf, stacked) > 1 for leaf in leaves]
        return jax.tree.structure(params).unflatten(found)

    return mask


def as_matrices(leaf: Leaf, stacked: Sequence[str], scans: "Scans") -> Matrices | None:
    """What a kernel is; `None` for a vector, and where it is empty.

    Raises:
        ValueError: where nothing tells which of its axes are inputs, or what stands beside it says
            that the first one counts layers though nobody has said so.
    """
    shape, role = leaf.parameter.shape, leaf.label.role
    layers = stacked_axes(leaf, stacked)
    counted = layers + (role.startswith("moe.expert") and len(shape) > layers + 2)
    own, axes = shape[counted:], len(shape) - counted
    heads = leaf.parameter.path[-1] == "kernel" and role.startswith("attention.")
    if axes < 2 or 0 in shape:
        return None
    if axes == 2 or (heads and axes in (3, 4) and role != "attention.out"):
        inputs = 1  # DenseGeneral's, with heads and their width as outputs
    elif role == "conv" or (heads and axes == 3):
        inputs = axes - 1
    else:
        raise _unclear(leaf, "nothing tells which axes are inputs of a matrix", leaf.name)
    branch = scans.around(leaf, own[inputs:]) if axes > 2 and not layers else None
    if branch is not None:
        raise _unclear(leaf, "by what stands beside it the first axis counts layers", branch)
    return math.prod(shape[:counted]), math.prod(own[:inputs]), math.prod(own[inputs:])


def _unclear(leaf: Leaf, why: str, pattern: str) -> ValueError:
    return ValueError(
        f"the axes of a kernel must be clear, got {leaf.name} with the shape {leaf.parameter.shape}"
        f': {why}; for scanned layers give stacked=("{pattern}",), or a rule that makes it a '
        '"vector", which Adam takes.'
    )


class Scans:
    """Where what stands beside a kernel says that its first axis counts layers.

    A kernel of heads, `(inputs, heads, width)`, and one of scanned layers, `(layers, inputs,
    outputs)`, have as many axes. A bias has the axes of the outputs, and one before them of layers.
    Without one all of a branch around the kernel begins with that axis, and there is a norm of two
    axes, or an output of the attention that would begin with the heads.
    """

    def __init__(self, leaves: Iterable[Leaf]) -> None:
        self._shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
        self._first: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
        self._flat: set[tuple[str, ...]] = set()
        self._norms: set[tuple[str, ...]] = set()
        self._outputs: set[tuple[str, ...]] = set()
        for leaf in leaves:
            path, shape, role = leaf.parameter.path, leaf.parameter.shape, leaf.label.role
            self._shapes[path] = shape
            for branch in (path[:depth] for depth in range(len(path))):
                self._first.setdefault(branch, set()).add(shape[:1])
                if role in ("bias", "norm", "norm.bias") and len(shape) < 2:
                    self._flat.add(branch)
                elif role in ("norm", "norm.bias"):
                    self._norms.add(branch)
                elif role == "attention.out" and len(shape) > 2:
                    self._outputs.add(branch)

    def around(self, leaf: Leaf, outputs: tuple[int, ...]) -> str | None:
        """The pattern of the scanned layers that a kernel is part of; `None` where none show.

        Args:
            leaf: a kernel of at least three axes.
            outputs: those of its axes that are taken for outputs.
        """
        path, shape, role = leaf.parameter.path, leaf.parameter.shape, leaf.label.role
        around = [path[:depth] for depth in range(len(path))]
        stacks = [
            branch
            for branch in around
            if self._first[branch] == {shape[:1]} and branch not in self._flat
        ]
        bias = self._shapes.get((*path[:-1], "bias"))
        scanned = (shape[0], *(shape[-1:] if role == "conv" else shape[2:]))
        if bias in (outputs, scanned) and outputs != scanned:
            local = role == "conv" and len(shape) == 3  # a kernel for each place has as many biases
            counts = bias == scanned and not local
        else:
            heads = role != "attention.out" and shape[0] != shape[1]
            counts = any(b in self._norms or (heads and b in self._outputs) for b in stacks)
        return ".".join((*[*stacks, around[-1]][0], "*")) if counts else None
