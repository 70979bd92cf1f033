"""What is trained: each workload is a model, its data, a loss and a held-out figure.

The language models and their text are the demo's; `examples/` is put on the path for them.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parents[2] / "examples"))


class Workload(NamedTuple):
    """One thing to train, in JAX. `loss` and `held_out` can be jitted and vmapped.

    Attributes:
        name: as it is given on the command line.
        steps: optimizer steps of a run.
        unit: what `held_out` measures, for tables and plots; lower is better.
        init: seed to initial parameters, a pytree of float32 arrays.
        loss: parameters and a batch to the training loss, a float32 scalar.
        batches: seed to an endless stream of batches, pytrees of NumPy arrays of fixed shapes.
        held_out: parameters to the figure on data that training does not see.
        settings: what defines the task besides the code, JSON values, kept beside every figure.
    """

    name: str
    steps: int
    unit: str
    init: Callable[[int], Any]
    loss: Callable[[Any, Any], Any]
    batches: Callable[[int], Iterator[Any]]
    held_out: Callable[[Any], Any]
    settings: dict[str, Any]


FAMILIES = {
    "shakespeare": ("small", "paper", "10m"),
    "digits": ("conv", "vit"),
    "finetuning": ("vit", "gpt"),
    "cartpole": (),
}
"""The modules of this package, and the sizes of each."""

NAMES = tuple(
    f"{family}-{size}" if size else family
    for family, sizes in FAMILIES.items()
    for size in (sizes or ("",))
)
"""Every workload by name."""

ALONE = ("finetuning-vit", "finetuning-gpt", "cartpole")
"""Without a PyTorch twin: they pretrain in JAX, or their environment is simulated in it."""


def load(name: str, data: str | None = None) -> Workload:
    """The workload of that name; its packages are imported only now.

    Args:
        name: one of `NAMES`.
        data: a text file for those on Shakespeare; `None` for the text they come with.

    Raises:
        ValueError: if there is no such workload, it takes no text, or what it needs is not
            installed.
    """
    if name not in NAMES:
        raise ValueError(f"the workload must be one of {', '.join(NAMES)}, got {name!r}.")
    family, _, size = name.partition("-")
    if data is not None and family != "shakespeare":
        raise ValueError(f"--data is a text for the workloads on Shakespeare, got {name}.")
    try:
        module = importlib.import_module(f"benchmarks._jax.workloads.{family}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name} needs the package {error.name}, which is not installed; "
            "run pip install -e '.[bench]'."
        ) from error
    if family == "shakespeare":
        return module.shakespeare(size, None if data is None else Path(data))
    make = getattr(module, family)
    return make(size) if size else make()
