"""What is finished, on disk as soon as it is, so that the same command goes on where it stopped.

A line of a file holds one thing and a digest of the code that made it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def files(patterns: Iterable[str], what: str) -> list[Path]:
    """The files of the repository that patterns name.

    Args:
        patterns: from its root.
        what: depends on them.

    Raises:
        FileNotFoundError: if a pattern names no file; what moved would else count as unchanged.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = [*ROOT.glob(pattern)]
        if not matches:
            raise FileNotFoundError(
                f"the sources of {what} must be files of this repository, got {pattern!r}, "
                "which names none; say where it has moved."
            )
        found.update(matches)
    return sorted(found)


def source_of(files: Iterable[Path], rest: Any) -> str:
    """A digest of what figures depend on.

    Args:
        files: of the repository.
        rest: what else counts, such as versions.
    """
    digest = hashlib.sha256(json.dumps(rest).encode())
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def lines(store: Path) -> Iterator[dict[str, Any]]:
    """What a file holds, which need not exist; a line cut short by a crash is passed over."""
    for line in store.read_text().splitlines() if store.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def finished(store: Path, source: str) -> list[dict[str, Any]]:
    """The rows in a file that this source made and that did not fail."""
    rows = (line["row"] for line in lines(store) if line["source"] == source)
    return [row for row in rows if "failed" not in row]


def keep(store: Path, source: str, row: dict[str, Any]) -> None:
    """Adds a row to the file."""
    with store.open("a") as file:
        file.write(json.dumps({"source": source, "row": row}) + "\n")
