"""`python -m benchmarks NAME`: every claim of the README as a command that measures it again."""

import argparse
import sys
from collections.abc import Sequence

from benchmarks._commands import MODULES, protocol
from benchmarks._protocol import run


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line `argv`, by default the process's own, names."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures the project's claims. Each name has a --help of its own.",
    )
    parser.add_argument("name", choices=[*MODULES, "report", "front-page"])
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = parser.parse_args(arguments[:1]).name
    if name == "report":
        from benchmarks.report import main as report

        report(arguments[1:])
    elif name == "front-page":
        from benchmarks.front_page import main as front_page

        front_page(arguments[1:])
    else:
        run(protocol(name), arguments[1:])


if __name__ == "__main__":
    main()
