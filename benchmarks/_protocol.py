"""What every benchmark is: a question with its options, figures, table and plot."""

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks._environment import environment
from benchmarks._kept_rows import onto

DPI = 130
"""Of every plot."""

OUTPUT = Path("benchmark-output")


class Rows(NamedTuple):
    """A table as text: what is printed and what the report shows.

    Attributes:
        headers: of the columns; the first one is aligned to the left.
        rows: cells by row.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


class Protocol(NamedTuple):
    """One benchmark.

    Attributes:
        name: as it is given on the command line.
        title: what it answers, one line.
        reading: how its table is to be read, for the report.
        arguments: adds its options to a parser, or sets them; `framework`, a name or several, is
            one of them, and the first names the device.
        measure: options and a console for progress to its figures, JSON values. They hold `part`,
            which names the file of these figures beside others of the protocol, and may hold
            `grid`, which has to be the same in all of them.
        rows: figures to the table.
        draw: draws the figures.
    """

    name: str
    title: str
    reading: str
    arguments: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace, Console], dict[str, Any]]
    rows: Callable[[dict[str, Any]], Rows]
    draw: Callable[[dict[str, Any]], Figure]


def run(protocol: Protocol, argv: Sequence[str]) -> None:
    """Runs a benchmark from the command line: measures, prints the table, writes JSON and plot.

    Args:
        protocol: which.
        argv: its arguments, without its name.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {protocol.name}",
        description=f"{protocol.title} {protocol.reading}",
    )
    protocol.arguments(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=OUTPUT,
        help="directory for figures, plots and finished runs (default: %(default)s)",
    )
    parser.add_argument(
        "--onto",
        type=Path,
        metavar="JSON",
        help="earlier figures of the same: rows that are not measured now are kept, each with its "
        "commit; only where nothing that made them has changed",
    )
    options = parser.parse_args(argv)
    if options.onto is not None and not options.onto.is_file():
        parser.error(
            f"--onto must name figures, got {options.onto}, which is no file; leave it out."
        )
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        figures = protocol.measure(options, console)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    framework = options.framework if isinstance(options.framework, str) else options.framework[0]
    result = {
        "protocol": protocol.name,
        "command": f"python -m benchmarks {shlex.join([protocol.name, *_shown(argv)])}",
        "environment": environment(framework),
        **figures,
    }
    if options.onto is not None:
        try:
            result = onto(result, options.onto)
        except ValueError as error:
            parser.error(str(error))
    path = options.output / f"{protocol.name}-{figures['part']}.json"
    path.write_text(json.dumps(_without_nan(result), indent=1) + "\n")
    protocol.draw(result).savefig(path.with_suffix(".png"), dpi=DPI)
    rows = protocol.rows(result)
    table = Table(title=protocol.title)
    for i, header in enumerate(rows.headers):
        table.add_column(header, justify="right" if i else "left", no_wrap=not i)
    for row in rows.rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"{result['environment']['device']}; {path} and {path.with_suffix('.png').name}")


def _shown(argv: Sequence[str]) -> list[str]:
    """The arguments with files named without the folder they lie in on this machine."""
    shown: list[str] = []
    for i, argument in enumerate(argv):
        if i and argv[i - 1] in ("--output", "--onto"):
            shown.pop()
        else:
            shown.append(Path(argument).name if os.sep in argument else argument)
    return shown


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: `null` stands for what is not finite."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
