"""The rows of the GPU benchmark: which there are, in which order, and what each asks a room for."""

import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks._frameworks import room
from benchmarks._runs import Record, Task
from benchmarks._shapes import SIZES, Shapes, gpt_shapes
from cruxy_exact import BlockCode, stream_key, verify
from cruxy_exact._namespace import largest
from cruxy_exact.random_bits import random_bits
from cruxy_exact.reference import Reference

FLOOR = {"adamw": 7, "meta3": 8, "meta_lion": 6, "self_driving": 11, "self_driving-no-average": 9}
"""Words of 4 bytes a parameter that a step must move where each tensor is read and written once in
each of its passes: gradients are read to be measured, and again to be used."""

FIRST = ("adamw", "meta3", "meta_lion", "self_driving", "self_driving-no-average")
SECOND = (
    "meta3-8bit", "meta3-4bit", "meta_lion-8bit", "axiom", "adamw-foreach", "muon", "torch-muon",
    "self_driving-muon", "torchao-adamw-8bit", "bitsandbytes-adamw-8bit",
)  # fmt: skip
WAITS = ("meta3", "self_driving", "axiom", "muon")
OF_JAX = ("adamw", "meta3", "meta_lion", "self_driving", "self_driving-no-average")
PARITY_STEPS = 50
DECAY = 0.01
"""Of the weights in a comparison of both frameworks, whose defaults differ from mode to mode."""
TRAJECTORIES = ("meta3", "meta_lion", "self_driving")

TRIED = "tiny"
GPU_SIZES: dict[str, Shapes] = {TRIED: gpt_shapes(1, 16, 65, 16), **SIZES}
"""The parameter sets by name; `TRIED` is for trying the command."""


class Row(NamedTuple):
    """Something to measure.

    Attributes:
        kind: `copy`, `step`, `waits`, `parity`, `exact`, `checksum`, `memory` or `training`.
        framework: "jax" or "torch".
        name: of the optimizer; empty for none.
        size: a key of `GPU_SIZES`; empty for none, or for that which the row is about.
    """

    kind: str
    framework: str
    name: str = ""
    size: str = ""

    @property
    def key(self) -> str:
        """By which a finished row is found again."""
        return " ".join(filter(None, self))


def rows(sizes: list[str], frameworks: list[str]) -> list[Row]:
    """All rows, the most valuable first.

    Args:
        sizes: keys of `GPU_SIZES`, the most valuable first.
        frameworks: of the rows.
    """
    found: list[Row] = []
    tried = TRIED if TRIED in sizes else ""
    if "torch" in frameworks:
        for size in sizes:
            found.append(Row("copy", "torch", size=size))
            found += [Row("step", "torch", name, size) for name in FIRST]
            if size == sizes[0]:
                found += [Row("waits", "torch", name, size) for name in WAITS]
                found += [Row("exact", "torch"), Row("checksum", "torch")]
                found += [Row("parity", "torch", name, tried) for name in TRAJECTORIES]
        found += [Row("step", "torch", name, sizes[0]) for name in SECOND]
    if "jax" in frameworks:
        found += [Row("parity", "jax", name, tried) for name in TRAJECTORIES]
        found += [Row("step", "jax", name, sizes[0]) for name in OF_JAX]
        found += [Row("exact", "jax"), Row("checksum", "jax")]
    if "torch" in frameworks:
        found += [Row("memory", "torch", name, tried) for name in ("axiom", "lion")]
        found += [Row("step", "torch", name, s) for s in sizes[1:] for name in SECOND]
    if "jax" in frameworks:
        found += [Row("step", "jax", name, size) for size in sizes[1:] for name in OF_JAX]
    trains = "jax" if "jax" in frameworks else "torch"
    found += [Row("training", trains, name, tried) for name in ("self_driving", "adamw-cosine")]
    return found


def measured(row: Row, repeats: int) -> dict[str, Any]:
    """What a row has, JSON values.

    Raises:
        Exception: whatever a framework or a device raises.
    """
    if row.kind == "memory":
        return _memory(row)
    if row.kind == "training":
        return _training(row)
    if row.kind == "checksum":
        return _checksum(row)
    module = room(row.framework, "gpu", "gpu")
    shapes = GPU_SIZES[row.size] if row.size else SIZES["0.1m"]
    measures: Mapping[str, Callable[[], dict[str, Any]]] = {
        "copy": lambda: module.copied(sum(map(math.prod, shapes.values())), repeats),
        "step": lambda: module.stepped(row.name, shapes, repeats),
        "waits": lambda: module.waits(row.name, shapes),
        "exact": lambda: _exact(module),
        "parity": lambda: _parity(row, module, shapes),
    }
    try:
        return measures[row.kind]()
    finally:
        module.forget()


def _parity(row: Row, module: Any, shapes: Shapes) -> dict[str, Any]:
    """How far steps on the device are from as many steps of PyTorch on the CPU."""
    steps = 2 if row.size == TRIED else PARITY_STEPS
    ours = module.trajectory(row.name, shapes, steps, DECAY)
    torch = room("torch", "gpu", "gpu")
    theirs = torch.trajectory(row.name, shapes, steps, DECAY, device="cpu")
    apart = {key: abs(ours[key] - value) for key, value in theirs.items()}
    return {
        "steps": steps,
        "largest_difference": float(max(value.max() for value in apart.values())),
        "above_1e-5": float(
            sum((value > 1e-5).sum() for value in apart.values())
            / sum(value.size for value in apart.values())
        ),
    }


def _exact(module: Any) -> dict[str, Any]:
    """Whether codes and random bits on the device are those of NumPy, to the bit."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((512, 256)) * np.exp(draw.standard_normal((512, 256)))
    index = np.arange(x.size, dtype=np.int32).reshape(x.shape)
    arrays = x.astype(np.float32), index, np.int32(7)
    with np.errstate(over="ignore"):
        wanted = _codes(*arrays, xp=np)
    found = module.on_device(_codes, *arrays)
    return {name: bool(np.array_equal(value, found[name])) for name, value in wanted.items()}


def _codes(x: Any, index: Any, count: Any, *, xp: Any) -> dict[str, Any]:
    """Random bits and the codes that they round, by name."""
    bits = random_bits(stream_key(count, 0, 0, xp=xp), index)
    found = {"random bits": bits}
    for width in (8, 4):
        for signed in (True, False):
            code, values = BlockCode(width, signed), x if signed else x * x
            scale = code.scale(largest(xp.abs(values), -1, xp=xp), xp=xp)
            kind = f"{width} bits, {'signed' if signed else 'non-negative'}"
            found[kind] = code.encode(values, scale, code.noise(bits), xp=xp)
    return found


def _checksum(row: Row) -> dict[str, Any]:
    """Whether the bit-exact package trains its reference model to the bits that are published."""
    device = "cpu" if room(row.framework, "gpu", "gpu").there() else "cuda"
    checksum, problem = verify.verify(verify.framework(row.framework, device), Reference())
    return {"checksum": checksum, "differs": problem or "nowhere"}


def _memory(row: Row) -> dict[str, Any]:
    """The peak of the 1.1B model's full training, in a process of its own, under 4 GiB."""
    example = Path(__file__).parents[1] / "examples" / "full_finetune_4gb.py"
    command = [sys.executable, str(example), "--steps", "5", "--optimizer", row.name]
    command += ["--tiny"] if row.size else []
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    if run.returncode:
        raise RuntimeError((run.stderr.strip().splitlines() or ["it failed"])[-1])
    peak = re.search(r"peak GPU memory.*?: ([\d.]+) GiB", run.stdout)
    alive = [line.strip() for line in run.stdout.splitlines() if "gradient" in line.lower()]
    return {"peak_gib": float(peak[1]) if peak else None, "gradients": alive}


def _training(row: Row) -> dict[str, Any]:
    """Held-out losses of 1,000 steps of the small GPT; of AdamW at three rates."""
    rates = (None,) if row.name == "self_driving" else (3e-4, 1e-3, 3e-3)
    workload, steps = ("shakespeare-small", 2) if row.size else ("shakespeare-10m", 1000)
    tasks = [
        Task(workload, row.name, rate or 1e-3, 0, steps, (steps,), framework=row.framework)
        for rate in rates
    ]
    records = _together(room(row.framework, "training", "training").train, tasks)
    losses = {str(task.rate): r.held_out[-1] for task, r in zip(tasks, records, strict=True)}
    return {"held_out": losses, "seconds": sum(record.seconds for record in records)}


def _together(train: Callable[[list[Task]], list[Record]], tasks: list[Task]) -> list[Record]:
    """Runs that JAX makes one of where they fit, else one after the other."""
    try:
        return train(tasks)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or len(tasks) == 1:
            raise
    return [record for task in tasks for record in train([task])]
