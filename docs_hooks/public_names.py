"""Which public names have no entry in the API pages: the build warns, and strictly so fails."""

import ast
import logging
import re
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.hooks.public_names")

_DIRECTIVE = re.compile(r"^::: (\S+)", re.MULTILINE)


def on_config(config: Any) -> None:
    """Warns of every public name without an entry, before pages are built."""
    for name in sorted(undocumented(Path(config.config_file_path).parent)):
        log.warning("%s is public and has no entry in docs/api; add '::: %s'.", name, name)


def undocumented(root: Path) -> set[str]:
    """The names in any package's `__all__` that no page of `docs/api` has a directive for."""
    pages = (root / "docs" / "api").glob("*.md")
    entries = {name for page in pages for name in _DIRECTIVE.findall(page.read_text("utf-8"))}
    return public_names(root) - entries


def public_names(root: Path) -> set[str]:
    """`package.name` for every name in the `__all__` of every `cruxy_*` package in `root`.

    The source is read and not imported: building the pages needs no framework.
    """
    return {
        f"{init.parent.name}.{name}"
        for init in root.glob("cruxy_*/__init__.py")
        for node in ast.parse(init.read_text("utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for name in ast.literal_eval(node.value)
    }
