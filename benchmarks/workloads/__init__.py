"""What is trained: each workload is a model, its data, a loss and a held-out figure.

The files here hold what both frameworks share, which is the data; models and losses lie in
`benchmarks/_jax/workloads` and `benchmarks/_torch/workloads`. The language models and their text
are the demo's; `examples/` is put on the path for them.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._frameworks import room

sys.path.append(str(Path(__file__).parents[2] / "examples"))


class Workload(NamedTuple):
    """One thing to train, in one framework.

    What is trained is a pytree of float32 arrays in JAX, where `loss` and `held_out` can be jitted
    and vmapped, and a module in PyTorch. From the same seed both start with the same numbers, but
    for rounding, and see the same batches.

    Attributes:
        name: as it is given on the command line.
        steps: optimizer steps of a run.
        unit: what `held_out` measures, for tables and plots; lower is better.
        init: seed to initial parameters, or to a new module that has them.
        loss: these and a batch to the training loss, a float32 scalar.
        batches: seed to an endless stream of batches, pytrees of NumPy arrays of fixed shapes.
        held_out: parameters or module to the figure on data that training does not see.
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
    "shakespeare": (
        *("small", "paper", "10m", "untied"),
        *("width-64", "width-96", "width-192", "width-384", "batch-2", "batch-160"),
    ),
    "digits": ("conv", "vit", "resnet", "diffusion"),
    "finetuning": ("vit", "gpt", "lora"),
    "cartpole": (),
    "char": ("lstm",),
    "table": ("mlp",),
}
"""The modules that make workloads, in the rooms, and the sizes of each."""

HOMES = {"digits-resnet": "residual", "digits-diffusion": "diffusion"}
"""Modules of those that need one of their own, which is called without a size."""

NAMES = tuple(
    f"{family}-{size}" if size else family
    for family, sizes in FAMILIES.items()
    for size in (sizes or ("",))
)
"""Every workload by name."""

IN_BOTH = (
    *("shakespeare-small", "shakespeare-paper", "shakespeare-10m"),
    *("digits-conv", "digits-vit"),
)

ALONE = tuple(name for name in NAMES if name not in IN_BOTH)
"""In JAX alone: their weights are drawn or learned in it, or nothing compares the frameworks by
them."""

TEXTS = ("shakespeare", "char")
"""Families that read a text, which may be another."""


def home(name: str) -> str:
    """The module of a workload."""
    return HOMES.get(name, name.partition("-")[0])


def load(name: str, data: str | None = None, framework: str = "jax") -> Workload:
    """The workload of that name in a framework; its packages are imported only now.

    Args:
        name: one of `NAMES`.
        data: a text file for those on Shakespeare (`TEXTS`); `None` for the text they come with.
        framework: "jax" or "torch".

    Raises:
        ValueError: if there is no such workload or not in this framework, it takes no text, or what
            it needs is not installed.
    """
    if name not in NAMES:
        raise ValueError(f"the workload must be one of {', '.join(NAMES)}, got {name!r}.")
    if framework == "torch" and name in ALONE:
        both = ", ".join(known for known in NAMES if known not in ALONE)
        raise ValueError(
            f"the workload must be one of {both} to be trained in PyTorch, got {name!r}."
        )
    family, _, size = name.partition("-")
    if data is not None and family not in TEXTS:
        raise ValueError(f"--data is a text for the workloads on Shakespeare, got {name}.")
    module = home(name)
    make = getattr(room(framework, f"workloads.{module}", name), module)
    if family in TEXTS:
        return make(size, None if data is None else Path(data))
    return make(size) if size and name not in HOMES else make()
