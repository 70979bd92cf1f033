"""Rows of earlier figures beside new ones, for a table of which only some optimizers changed."""

import json
from pathlib import Path
from typing import Any

SAME = (
    *("protocol", "part", "workload", "seeds", "fault_labels", "rates", "ends", "tuning_seeds"),
    *("steps", "stop", "parameters", "workloads"),
)
"""What figures must share for their rows to stand in one table, where they have it."""

OWN = ("framework", "name", "model", "stacked", "mesh")
"""What tells rows apart that have no names of their own, where they have it."""


def onto(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """The new figures, with those rows of earlier ones that were not measured anew.

    Each of these says its commit. Whoever keeps rows vouches that what made them has not changed.

    Args:
        result: the new figures.
        path: a JSON file of the same benchmark.

    Raises:
        ValueError: if the earlier figures are of something else, of another machine or of a
            working tree with changes.
    """
    kept = json.loads(path.read_text())
    if "optimizers" not in result or "optimizers" not in kept:
        raise ValueError(
            f"--onto must go with a table of optimizers, got {path.name} beside figures of "
            f"{result['protocol']}; measure all rows anew."
        )
    for what in SAME:
        if kept.get(what) != json.loads(json.dumps(result.get(what))):
            raise ValueError(
                f"--onto must name figures with the same {what}, got {kept.get(what)!r} beside "
                f"{result.get(what)!r}; measure all rows anew."
            )
    then, now = kept["environment"], result["environment"]
    if then["changed"]:
        raise ValueError(f"--onto must name figures of a commit, got {path.name}, which has none.")
    for what, found, here in (
        ("processor", then["processor"], now["processor"]),
        ("versions", _others(then["versions"]), _others(now["versions"])),
    ):
        if found != here:
            raise ValueError(
                f"--onto must name figures of this {what}, got {found!r} beside {here!r}; measure "
                "all rows anew."
            )
    new, old = _by_name(result["optimizers"]), _by_name(kept["optimizers"])
    commit = {"commit": then["commit"]}
    rows = {name: new[name] if name in new else commit | row for name, row in old.items()} | new
    listed = isinstance(result["optimizers"], list)
    merged = result | {"optimizers": list(rows.values()) if listed else rows}
    if "grid" in result:
        merged["grid"] = kept["grid"] | result["grid"]
    return merged


def _by_name(rows: Any) -> dict[Any, dict[str, Any]]:
    """The rows of a table by what tells them apart."""
    if isinstance(rows, dict):
        return rows
    return {tuple(str(row.get(what)) for what in OWN): row for row in rows}


def _others(versions: dict[str, Any]) -> dict[str, Any]:
    """Without our own, which the commit tells."""
    return {name: version for name, version in versions.items() if name != "cruxy-optax"}


def earlier(result: dict[str, Any]) -> dict[str, list[str]]:
    """The labels of kept rows, by their commit; frameworks of one table are measured together."""
    found: dict[str, list[str]] = {}
    rows = result.get("optimizers", ())
    for row in rows.values() if isinstance(rows, dict) else rows:
        if isinstance(row, dict) and "commit" in row:
            found.setdefault(row["commit"], []).append(row["label"])
    return {commit: list(dict.fromkeys(labels)) for commit, labels in found.items()}
