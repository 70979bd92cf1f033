"""Calls in a process of their own, which may run out of memory, crash or hang there."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any, Self


class FailedError(Exception):
    """A call that failed; its text is one line."""


class LateError(FailedError):
    """A call that took too long."""


class EndedError(FailedError):
    """A call that ended its process."""


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Has processes that are started meanwhile see these variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Apart:
    """A process that answers calls one after the other.

    It begins with the first call, and ends with one that fails: an error of a device may spoil
    all that follows in the same process, and memory of a call that failed may stay taken.

    Args:
        variables: of its environment, beside those of this process.
    """

    def __init__(self, variables: Mapping[str, str] | None = None) -> None:
        self._variables = variables or {}
        self._context = multiprocessing.get_context("spawn")  # a device does not survive a fork
        self._process: Any = None
        self._connection: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def call(self, seconds: float, function: Callable[..., Any], *args: Any) -> Any:
        """What a function gives there.

        Args:
            seconds: after which it is given up.
            function: of a module, as its arguments and its result are sent.
            *args: of the function.

        Raises:
            FailedError: where it raises; `EndedError` where it ends its process, and `LateError`
                where it takes too long.
        """
        if self._process is None:
            self._connection, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_answer, args=(theirs,), daemon=False)
            with environment(self._variables):
                self._process.start()
            theirs.close()  # so that its end shows here
        try:
            self._connection.send((function, args))
            if not self._connection.poll(seconds):
                raise LateError(f"TimeoutError: not finished after {seconds:.0f} s")
            found, why = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(10.0)
            code = self._process.exitcode
            self.end()
            raise EndedError(f"the process ended with exit code {code}") from error
        except BaseException:
            self.end()
            raise
        if why:
            self.end()
            raise FailedError(why)
        return found

    def end(self) -> None:
        """Ends the process, with all that it holds on a device."""
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._process = None


def _answer(connection: Connection) -> None:
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            answer = function(*args), ""
        except Exception as error:  # whatever a framework or a device raises
            answer = None, line(error)
        connection.send(answer)


def line(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
