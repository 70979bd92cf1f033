"""Steps counted in a process of their own, which has as many devices as a mesh."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Task(NamedTuple):
    """What to count.

    Attributes:
        name: of the optimizer.
        model: a key of `MODELS`.
        stacked: whether all layers are one tensor each.
    """

    name: str
    model: str
    stacked: bool


def counted(
    module: str,
    mesh: Mapping[str, int],
    tasks: Sequence[Task],
    *,
    patience: float,
    environment: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """What each task takes on a device, as soon as it is known; `failed` says why one is not.

    Args:
        module: whose main program hands its function to `answer`.
        mesh: sizes of the axes by name, in order.
        tasks: in the order of the answers.
        patience: seconds until a task is given up.
        environment: variables of the process.
    """
    left = list(tasks)
    while left:
        wanted = json.dumps([dict(mesh), left])
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", module, wanted],
                env=os.environ | dict(environment or {}),
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
            assert process.stdout is not None
            reason = ""
            try:
                while left and not reason:
                    begun = time.monotonic()
                    alarm = threading.Timer(patience, process.kill)
                    alarm.start()
                    line = process.stdout.readline()
                    alarm.cancel()
                    if line:
                        left.pop(0)
                        yield json.loads(line)
                    elif time.monotonic() - begun < patience:
                        said.seek(0)
                        reason = (said.read().strip().splitlines() or ["it ended"])[-1]
                    else:
                        reason = f"took more than {patience:g} seconds"
            finally:
                process.kill()  # of no effect on one that has ended
                process.stdout.close()
                process.wait()
        if reason:  # a process of its own for what comes after the task that ended this one
            left.pop(0)
            yield {"failed": reason}


def answer(count: Callable[[Task, Mapping[str, int]], dict[str, Any]]) -> None:
    """The main program of such a process: a line for each task.

    Args:
        count: what is known of a task on a mesh; an exception is a task that failed.
    """
    mesh, tasks = json.loads(sys.argv[1])
    for task in tasks:
        try:
            found = count(Task(*task), mesh)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            found = {"failed": f"{type(error).__name__}: {lines[0]}"}
        print(json.dumps(found), flush=True)
