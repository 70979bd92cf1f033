"""Runs many training runs, keeps each as soon as it is done, and never runs one twice.

A finished run is a line of `runs.jsonl` in the output directory. A line counts for a task if it was
made by the same source code, so an interrupted sweep goes on where it stopped, protocols share the
runs they have in common, and a changed optimizer or workload is run anew.
"""

import concurrent.futures
import functools
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import _finished
from benchmarks._apart import environment
from benchmarks._environment import basis
from benchmarks._frameworks import FRAMEWORKS, room
from benchmarks._runs import Record, Task, record_from_json, task_from_json, to_json
from benchmarks.workloads import home

_DEMO = ("examples/_data.py", "examples/_demo.py")
_DIGITS = ("benchmarks/workloads/digits.py", "benchmarks/_{framework}/workloads/digits.py")
_GPT = {
    "jax": (*_DEMO, "examples/_gpt.py", "examples/_training.py"),
    "torch": (*_DEMO, "examples/_gpt_torch.py", "examples/shakespeare_torch.py"),
}
_SHAKESPEARE = (
    "benchmarks/workloads/shakespeare.py",
    "benchmarks/_{framework}/workloads/shakespeare.py",
)
_WEIGHTS = "benchmarks/_jax/workloads/weights.py"

ENGINES = {
    "jax": ("benchmarks/_jax/training.py", "benchmarks/_jax/faults.py", "benchmarks/faults.py"),
    "torch": (
        "benchmarks/_torch/training.py",
        "benchmarks/_torch/device.py",
        "benchmarks/_torch/workloads/weights.py",
    ),
}
"""What every run of a framework goes through."""

WORKLOADS = {
    "digits": _DIGITS,
    "shakespeare": _SHAKESPEARE,
    "finetuning": ("benchmarks/_jax/workloads/finetuning.py", *_DIGITS, *_SHAKESPEARE),
    "cartpole": ("benchmarks/_jax/workloads/cartpole.py",),
    "char": (
        "benchmarks/_jax/workloads/char.py",
        "benchmarks/workloads/shakespeare.py",
        *(_WEIGHTS, *_DEMO),
    ),
    "table": ("benchmarks/_jax/workloads/table.py", _WEIGHTS),
    "residual": ("benchmarks/_jax/workloads/residual.py", _WEIGHTS, *_DIGITS),
    "diffusion": ("benchmarks/_jax/workloads/diffusion.py", _WEIGHTS, *_DIGITS),
}
"""What defines the workloads of a module."""


def files(framework: str, optimizer: str, workload: str) -> list[Path]:
    """The files that a run's figures depend on.

    Protocols, tables and plots are not among them, nor are other optimizers and workloads.

    Args:
        framework: "jax" or "torch".
        optimizer: a name of the framework's registry.
        workload: a name that `workloads.load` knows.

    Raises:
        FileNotFoundError: if a pattern names no file; what moved would else count as unchanged.
    """
    family = home(workload)
    patterns = [
        *entry(framework, optimizer).sources,
        *ENGINES[framework],
        "benchmarks/workloads/__init__.py",
        *(pattern.format(framework=framework) for pattern in WORKLOADS.get(family, ())),
        *(_GPT[framework] if family in ("shakespeare", "finetuning") else ()),
    ]
    return _finished.files(patterns, optimizer)


@functools.cache
def source(framework: str, optimizer: str, workload: str) -> str:
    """A digest of what a run's figures depend on besides its task: code, versions, device.

    Args:
        framework: "jax" or "torch".
        optimizer: a name of the framework's registry.
        workload: a name that `workloads.load` knows.
    """
    return _finished.source_of(files(framework, optimizer, workload), basis(framework))


def entry(framework: str, optimizer: str) -> Any:
    """The registry's entry; a framework is imported only where it is used."""
    return room(framework, "our_optimizers", FRAMEWORKS[framework]).OPTIMIZERS[optimizer]


def finished(store: Path) -> dict[Task, Record]:
    """The runs in a store that the present code made.

    Args:
        store: a `runs.jsonl`; it need not exist.
    """
    runs: dict[Task, Record] = {}
    for line in _finished.lines(store):
        task = task_from_json(line["task"])
        if line["source"] == _source(task):
            runs[task] = record_from_json(line["record"])
    return runs


def _source(task: Task) -> str:
    return source(task.framework, task.optimizer, task.workload)


def sweep(
    tasks: Iterable[Task], store: Path, *, workers: int, console: Console
) -> dict[Task, Record]:
    """Runs what is missing and returns everything asked for.

    Args:
        tasks: what to run; a task that comes twice is run once.
        store: the `runs.jsonl` that finished runs are read from and added to.
        workers: processes of one thread each, which suits models too small for more; 0 runs here,
            with all rates and seeds of an optimizer at once, which suits a GPU.
        console: where the progress is shown.

    Raises:
        RuntimeError: if a run fails; those that were done before are kept.
    """
    wanted = list(dict.fromkeys(tasks))
    done = finished(store)
    missing = [task for task in wanted if task not in done]
    store.parent.mkdir(parents=True, exist_ok=True)
    with _progress(console) as bar, store.open("a") as out:
        reused = len(wanted) - len(missing)
        shown = bar.add_task("training", total=len(missing), reused=reused, newest="")
        for task, record in _results(missing, workers):
            line = {"source": _source(task), "task": to_json(task), "record": to_json(record)}
            out.write(json.dumps(line) + "\n")
            out.flush()
            # As a later command will read it.
            done[task] = record_from_json(line["record"])
            newest = f"{task.optimizer} {task.rate:g}: {record.held_out[-1]:.3f}"
            bar.update(shown, advance=1, newest=newest)
    return {task: done[task] for task in wanted}


def _results(missing: Sequence[Task], workers: int) -> Iterator[tuple[Task, Record]]:
    if not missing:
        return
    if workers == 0:
        groups: dict[Task, list[Task]] = {}
        for task in missing:
            groups.setdefault(task._replace(rate=0.0, seed=0), []).append(task)
        for together in groups.values():
            yield from zip(together, _train(together), strict=True)
        return
    with (
        environment(_single_threaded()),
        concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context("spawn")
        ) as pool,
    ):
        futures = {pool.submit(_train, [task]): task for task in missing}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()[0]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _train(tasks: Sequence[Task]) -> list[Record]:
    """Runs in a worker; each framework is imported only where it is used."""
    framework = tasks[0].framework
    try:
        engine = getattr(entry(framework, tasks[0].optimizer), "engine", "training")
        return room(framework, engine, FRAMEWORKS[framework]).train(tasks)
    except Exception as error:
        raise RuntimeError(f"the run {tasks[0]} failed: {error}") from error


def _single_threaded() -> dict[str, str]:
    """Variables of processes of one thread each."""
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    return {"OMP_NUM_THREADS": "1", "XLA_FLAGS": flags}


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("({task.fields[reused]} reused)"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[newest]}"),
        console=console,
    )
