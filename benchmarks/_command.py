"""What every timing command shares: its options, and where its figures go."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._shapes import SIZES


def parser(
    name: str, description: str | None, optimizers: Iterable[str]
) -> argparse.ArgumentParser:
    """The options of a step-time command.

    Args:
        name: of its module, below `benchmarks`, and of its JSON file.
        description: the module's docstring, whose first line is shown.
        optimizers: what can be timed.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=(description or "").splitlines()[0]
    )
    made.add_argument("--size", choices=SIZES, default="10m", help="parameter set (default: 10m)")
    made.add_argument(
        "--repeats", type=_rounds, default=100, help="rounds that count (default: 100)"
    )
    made.add_argument(
        "--optimizer", choices=optimizers, action="append", help="one of several; default: all"
    )
    made.add_argument(
        "--output",
        type=Path,
        default=Path(f"benchmark-output/{name}.json"),
        help="where the figures go as JSON (default: %(default)s)",
    )
    return made


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(
            f"--repeats must be at least 2, got {text}; 100 gives a steady one"
        )
    return int(text)


def publish(result: dict[str, Any], table: Table, output: Path, line: str) -> None:
    """Writes the figures as JSON and prints their table, with `line` and the file below it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(f"{line}; {output}")
