"""The shapes of a model's parameters, from the headers of its weights, of which none are read."""

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cruxy_control.memory import Model
from cruxy_optax._roles.parameters import labelled

_INDEX = "model.safetensors.index.json"
_FLOATING = ("F", "BF")
_LINEAR = ("attention", "mlp", "ssm", "matrix")


def skeleton(source: str | Path, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """A tree of shapes with the names of a model in safetensors, nested at their dots.

    Args:
        source: a folder with safetensors, or a name on the hub.
        dtype: of what is floating-point; the rest is int32, as no model trains it.

    Raises:
        ImportError: where safetensors or huggingface_hub is needed and not installed.
        OSError: where there are no safetensors.
        ValueError: where the index of a folder is none, or two tensors cannot stand in one tree.
    """
    tree: dict[str, Any] = {}
    for name, kind, shape in _headers(source):
        *folders, last = name.split(".")
        place: Any = tree
        for folder in folders:
            place = place.setdefault(folder, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last in place:
            raise ValueError(
                f"tensors must have names that make a tree at their dots, got {name!r} beside one "
                "with a part of it, or twice."
            )
        kept = dtype if kind.startswith(_FLOATING) else jnp.int32
        place[last] = jax.ShapeDtypeStruct(tuple(shape), kept)
    return tree


def _headers(source: str | Path) -> Iterator[tuple[str, str, list[int]]]:
    folder = Path(source)
    if not folder.is_dir():
        hub = _needed("huggingface_hub", f"reading {str(source)!r} from the hub")
        try:
            found = hub.get_safetensors_metadata(str(source))
        except Exception as error:  # the hub has a dozen kinds, all of which say what is wrong
            raise OSError(_no_model(source)) from error
        for file in found.files_metadata.values():
            for name, tensor in file.tensors.items():
                yield name, tensor.dtype, tensor.shape
        return
    safetensors = _needed("safetensors", f"reading {str(source)!r}")
    files = _files(folder)
    if not files:
        raise OSError(_no_model(source))
    for file in files:
        with safetensors.safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dictionary
                part = tensors.get_slice(name)
                yield name, part.get_dtype(), part.get_shape()


def _files(folder: Path) -> list[Path]:
    """The files of a model: those of its index, else `model.safetensors`, else all there are."""
    index = folder / _INDEX
    if not index.exists():
        whole = folder / "model.safetensors"
        return [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))
    try:
        names = {*json.loads(index.read_text("utf-8"))["weight_map"].values()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{index} must be JSON with a weight_map from tensors to files, got {error!r}; fetch "
            "it again."
        ) from error
    outside = sorted(str(name) for name in names if Path(str(name)).name != name)
    if outside:
        raise ValueError(f"{index} must name files of its own folder, got {outside[0]!r}.")
    return sorted(folder / name for name in names)


def _needed(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what} needs the package {module}, which is not installed; "
            "pip install 'cruxy-optax[hf]'."
        ) from error


def _no_model(source: str | Path) -> str:
    return (
        "a model must be a folder with safetensors or a name on the hub that has them, got "
        f"{str(source)!r}; give a tree of parameters or of their shapes (jax.eval_shape)."
    )


def sizes_of(params: Any) -> Model:
    """The sizes of a tree that decide what it takes in few bits, by the roles of its leaves."""
    count, linear = 0, []
    for leaf in labelled(params, None, ()).leaves:
        shape = tuple(leaf.value.shape)
        count += math.prod(shape)
        if len(shape) == 2 and leaf.label.role.split(".")[0] in _LINEAR:
            linear.append(shape[::-1] if leaf.name.endswith("kernel") else shape)
    return Model(count=count, linear=tuple(linear))
