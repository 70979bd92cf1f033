"""Rows of a table on disk, each as soon as it is finished, so that the same command goes on."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def source_of(patterns: Iterable[str], rest: Any) -> str:
    """A digest of what rows depend on.

    Args:
        patterns: of the files, from the root of the repository.
        rest: what else counts, such as versions; its `repr` does.
    """
    digest = hashlib.sha256(repr(rest).encode())
    for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern)}):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def finished(store: Path, source: str) -> list[dict[str, Any]]:
    """The rows in a file that this source made and that did not fail; it need not exist."""
    found = []
    for line in store.read_text().splitlines() if store.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # a run that was killed as it wrote
            continue
        if entry["source"] == source and "failed" not in entry["row"]:
            found.append(entry["row"])
    return found


def keep(store: Path, source: str, row: dict[str, Any]) -> None:
    """Adds a row to the file."""
    with store.open("a") as file:
        file.write(json.dumps({"source": source, "row": row}) + "\n")
