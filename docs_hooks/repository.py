"""Where the repository is: said once, in pyproject.toml, and carried everywhere from there.

    python -m docs_hooks.repository https://github.com/OWNER/NAME

writes the address into pyproject.toml, into the install lines of the README and the quickstart, and
into the README's links, which have to be absolute on a package page. The site reads it when it is
built: with an address its pages link to the repository and to their source.
"""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

# A link of the README to a file of the repository.
_LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")


def on_config(config: Any) -> None:
    """Lets pages link to the repository and to their source."""
    address = repository(ROOT)
    if address:
        config.repo_url = address
        config.repo_name = address.removeprefix("https://github.com/")
        config.edit_uri = "edit/main/docs/"
        config.theme["features"].append("content.action.edit")


def repository(root: Path) -> str | None:
    """The address in pyproject.toml; `None` while there is none."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    return project.get("urls", {}).get("Repository")


def set_repository(root: Path, address: str) -> None:
    """Writes the address wherever a file has to name it.

    Args:
        root: the checkout.
        address: `https://...`, without a slash or `.git` at its end.

    Raises:
        ValueError: if it is no such address.
    """
    if not re.fullmatch(r"https://[\w.-]+(/[\w.-]+)+(?<!\.git)", address):
        raise ValueError(
            f"the address must be https://HOST/OWNER/NAME without .git, got {address!r}."
        )
    path = root / "pyproject.toml"
    text = path.read_text("utf-8")
    line = f'Repository = "{address}"'
    if repository(root):
        text = re.sub(r'(?m)^Repository = ".*"$', line, text)
    elif "[project.urls]\n" in text:
        text = text.replace("[project.urls]\n", f"[project.urls]\n{line}\n")
    else:
        before = "[project.optional-dependencies]\n"
        text = text.replace(before, f"[project.urls]\n{line}\n\n{before}")
    known = _installed_from(root)
    path.write_text(text, "utf-8")
    for page in (root / "README.md", root / "docs" / "index.md"):
        page.write_text(page.read_text("utf-8").replace(known, address), "utf-8")
    readme = root / "README.md"
    readme.write_text(absolute(readme.read_text("utf-8"), address), "utf-8")


def absolute(page: str, address: str) -> str:
    """A page whose links to files are absolute: pictures raw, everything else as it is shown."""

    def whole(match: re.Match[str]) -> str:
        kind = "raw" if match[1].endswith(".png") else "blob"
        return f"]({address}/{kind}/main/{match[1]})"

    return _LINK.sub(whole, page)


def _installed_from(root: Path) -> str:
    """The address that the README's install line names now."""
    found = re.search(r"git\+(https://[^\"\s]+)", (root / "README.md").read_text("utf-8"))
    if found is None:
        raise ValueError("README.md must have an install line with git+https://, got none.")
    return found[1]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m docs_hooks.repository https://HOST/OWNER/NAME")
    try:
        set_repository(ROOT, sys.argv[1])
    except ValueError as error:
        sys.exit(str(error))
