"""Checkpoints of a run: written whole or not at all, and checked before anything is changed."""

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cruxy_torch._memory.estimate import is_coded

FORMAT = 1


def write(path: Path, save: Any) -> None:
    """Has a file written beside its place and then put there, so that no half of one is ever seen.

    Args:
        path: the file.
        save: writes into an open binary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def path_of(folder: Path, prefix: str, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"{prefix}-{step}.pt"


def latest(folder: Path, prefix: str) -> Path | None:
    """The checkpoint with the highest step; `None` where there is none."""
    pattern = re.compile(re.escape(prefix) + r"-(\d+)\.pt")
    found = [
        (int(match[1]), p) for p in folder.glob("*.pt") if (match := pattern.fullmatch(p.name))
    ]
    return max(found)[1] if found else None


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint holds.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: where it is not of this trainer.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"a checkpoint must exist to be loaded, got {str(path)!r}; resume='latest' takes the "
            "newest there is, or begins anew."
        )
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(saved, Mapping) or saved.get("format") != FORMAT:
        raise ValueError(
            f"a checkpoint must be one that Trainer has saved, got {str(path)!r}, which is not; "
            "load other files with torch.load."
        )
    return dict(saved)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What of a model a checkpoint holds: all but the codes that `load_model` makes anew."""
    coded = {name for name, p in model.named_parameters(remove_duplicate=False) if is_coded(p)}
    owners = {name.rpartition(".")[0] for name in coded}
    plain = {name for name, _ in model.named_parameters(remove_duplicate=False)} - coded
    kept = model.state_dict()
    return {
        name: value
        for name, value in kept.items()
        if isinstance(value, Tensor)
        and name not in coded
        and (name in plain or not any(name.startswith(f"{owner}.") for owner in owners if owner))
    }


def load_weights(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copies saved weights into the model's own tensors.

    Raises:
        ValueError: where names or shapes differ; nothing is changed then.
    """
    own = weights(model)
    for name, value in own.items():
        if name not in saved:
            raise ValueError(
                f"the checkpoint must hold every weight of the model, got none for {name}; build "
                "the model as it was when it was saved."
            )
        if saved[name].shape != value.shape:
            raise ValueError(
                f"{name} must have shape {tuple(value.shape)}, got {tuple(saved[name].shape)} in "
                "the checkpoint; build the model as it was when it was saved."
            )
    unknown = sorted(saved.keys() - own.keys())
    if unknown:
        raise ValueError(
            f"the model must have every weight of the checkpoint, got none named {unknown[0]}; "
            "build the model as it was when it was saved."
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(saved[name])
