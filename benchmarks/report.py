"""Turns the benchmarks' figures into `docs/evidence.md`: tables, plots, commands, machine.

Figures that do not belong together are refused: those of a working tree with changes that no commit
holds, and tables of one benchmark that were taken on different grids, or at different commits that
their rows do not say.
"""

import argparse
import json
import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks._commands import MODULES, protocol
from benchmarks._kept_rows import earlier
from benchmarks._protocol import DPI, OUTPUT, Protocol, Rows
from benchmarks.workloads import NAMES

DOCS = Path("docs")

INTRODUCTION = """# Evidence

Everything below is made by one command each, written under its table, and this page by
`python -m benchmarks report`. Losses are means over seeds on data that training does not see, with
standard errors; where a rate is tuned, every optimizer gets the same number of trials of it and
nothing else. Where ours lose, the table shows it.
"""


def main(argv: Sequence[str]) -> None:
    """Writes the page.

    Args:
        argv: the arguments, without the name of the command.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report", description="Writes docs/evidence.md from the figures."
    )
    parser.add_argument(
        "--input", type=Path, default=OUTPUT, help="where the figures are (default: %(default)s)"
    )
    parser.add_argument(
        "--docs", type=Path, default=DOCS, help="where the page goes (default: %(default)s)"
    )
    parser.add_argument(
        "--redraw",
        nargs="+",
        default=[],
        metavar="NAME",
        help="draw these plots anew from their figures, such as rate-sensitivity-cartpole",
    )
    options = parser.parse_args(argv)
    try:
        results = read(options.input)
        page = write(results)
        redraw(results, options.redraw)
    except ValueError as error:
        parser.error(str(error))
    folder = options.docs / "evidence"
    folder.mkdir(parents=True, exist_ok=True)
    for path in results:
        for file in (path, path.with_suffix(".png")):
            if file.parent.resolve() != folder.resolve():
                shutil.copy(file, folder)
    (options.docs / "evidence.md").write_text(page)
    print(f"{options.docs / 'evidence.md'}: {len(results)} tables")


def read(folder: Path) -> dict[Path, dict[str, Any]]:
    """The figures in a folder, by file, once they were found to belong together.

    Raises:
        ValueError: if there are none, or some do not belong together; the message says which and
            what to do.
    """
    paths = [path for name in MODULES for path in sorted(folder.glob(f"{name}-*.json"))]
    if not paths:
        raise ValueError(
            f"--input must hold figures of the benchmarks, got {folder}, which holds none; "
            "run python -m benchmarks rate-sensitivity."
        )
    results = {path: json.loads(path.read_text()) for path in paths}
    for path, result in results.items():
        if result["environment"]["changed"]:
            raise ValueError(
                f"{path.name} was measured with changes that no commit holds; commit them and run "
                f"{result['command']} again."
            )
    for name in MODULES:
        same = {path: result for path, result in results.items() if result["protocol"] == name}
        check_alike(same)
    return results


def redraw(results: dict[Path, dict[str, Any]], names: Sequence[str]) -> None:
    """Draws plots anew beside their figures, as the benchmark would draw them now.

    Raises:
        ValueError: if no figures have such a name.
    """
    by_name = {path.stem: path for path in results}
    for name in names:
        if name not in by_name:
            raise ValueError(f"--redraw must be of {', '.join(by_name)}, got {name}.")
        path = by_name[name]
        figure = protocol(results[path]["protocol"]).draw(results[path])
        figure.savefig(path.with_suffix(".png"), dpi=DPI)


def check_alike(results: dict[Path, dict[str, Any]]) -> None:
    """Refuses tables of one benchmark whose commit, or an optimizer's grid, differ.

    A table with rows of earlier commits says which they are, and is of none alone. A grid may be
    wider where the best rate was at its edge. What takes different things apart, as ablations do,
    needs one commit for each.

    Raises:
        ValueError: if they do.
    """
    commits: dict[str | None, dict[str, Path]] = {}
    grids: dict[str, tuple[Path, Any]] = {}
    for path, result in results.items():
        if not earlier(result):
            of_whole = commits.setdefault(result.get("whole"), {})
            of_whole.setdefault(result["environment"]["commit"], path)
        for optimizer, grid in result.get("grid", {}).items():
            if len(grid) == 1:
                continue  # a start, or what another table has chosen
            first, known = grids.setdefault(optimizer, (path, grid))
            if not (set(known) <= set(grid) or set(known) >= set(grid)):
                raise ValueError(
                    f"{optimizer} has the grid {known} in {first.name} and {grid} in {path.name}; "
                    "run one of them again."
                )
    for of_whole in commits.values():
        if len(of_whole) < 2:
            continue
        listed = ", ".join(
            f"{path.name} at {str(commit)[:10]}" for commit, path in of_whole.items()
        )
        raise ValueError(f"figures of one benchmark need one commit, got {listed}; run them again.")


def write(results: dict[Path, dict[str, Any]]) -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION]
    shown = ""
    for path, result in results.items():
        found = protocol(result["protocol"])
        if found.name != shown:
            parts.append(_heading(found))
            shown = found.name
        parts.append(_section(path, result, found))
    parts.append(_unknown(list(results.values())))
    return "\n".join(parts)


def _unknown(results: Collection[dict[str, Any]]) -> str:
    """What no figure above says."""
    measured = {result["protocol"] for result in results}
    trained = {result["workload"]["name"] for result in results if "workload" in result}
    devices = {result["environment"]["device"].partition(":")[0] for result in results}
    gaps = [
        ("Benchmarks that have not been run", [name for name in MODULES if name not in measured]),
        ("Workloads that nothing was trained on", [name for name in NAMES if name not in trained]),
        ("Devices", [name for name in ("gpu",) if not devices & {"gpu", "cuda"}]),
    ]
    lines = [f"- {what}: {', '.join(names)}." for what, names in gaps if names]
    lines.append("- Whether any of it holds for larger models, longer runs or other data.")
    return "\n".join(["## What is not known\n", *lines, ""])


def _heading(found: Protocol) -> str:
    return f"## {found.title.rstrip('.')}\n\n{found.reading}\n"


def _section(path: Path, result: dict[str, Any], found: Protocol) -> str:
    environment = result["environment"]
    packages = ", ".join(
        f"{name} {version}" for name, version in environment["versions"].items() if version
    )
    facts = [
        f"{environment['processor']}, {environment['cores']} cores; {environment['device']}",
        f"Python {environment['python']}, {packages}",
        f"commit {(environment['commit'] or 'not known')[:10]}",
        *(f"{', '.join(who)} at {commit[:10]}" for commit, who in earlier(result).items()),
    ]
    if "seeds" in result:
        facts.insert(0, f"seeds {', '.join(map(str, result['seeds']))}")
    return "\n".join(
        [
            f"### {result['part']}\n",
            _markdown(found.rows(result)),
            f"\n![{found.title} {result['part']}](evidence/{path.stem}.png)\n",
            f"```console\n$ {result['command']}\n```\n",
            f"{'; '.join(facts)}. [Figures as JSON](evidence/{path.name}).\n",
        ]
    )


def _markdown(rows: Rows) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    marks = ["---", *["---:"] * (len(rows.headers) - 1)]
    return "\n".join([line(rows.headers), line(marks), *(line(row) for row in rows.rows)])
