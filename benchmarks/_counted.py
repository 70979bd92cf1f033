"""Steps counted in a process of their own, which has as many devices as a mesh."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks._apart import Apart, EndedError, FailedError, LateError


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
    count: Callable[[Task, Mapping[str, int]], dict[str, Any]],
    mesh: Mapping[str, int],
    tasks: Sequence[Task],
    *,
    patience: float,
    variables: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """What each task takes on a device, as soon as it is known; `failed` says why one is not.

    Args:
        count: what is known of a task on a mesh; of a module, as it is sent.
        mesh: sizes of the axes by name, in order.
        tasks: in the order of the answers.
        patience: seconds until a task is given up.
        variables: of the environment of the process.
    """
    with Apart(variables) as apart:
        for task in tasks:
            try:
                found = apart.call(patience, count, task, mesh)
            except LateError:
                found = {"failed": f"took more than {patience:g} seconds"}
            except EndedError:
                found = {"failed": "it ended"}
            except FailedError as error:
                found = {"failed": str(error)}
            yield found
