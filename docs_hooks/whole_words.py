"""Keeps the options of a command whole where inline code breaks: `-m`, `--repeats`, `step-time`."""

import re
from typing import Any

_CODE = re.compile(r"<code>([^<]+)</code>")
_HYPHENED = re.compile(r"[\w&;=.]*(?:-+\w+)+")


def on_page_content(content: str, **_: Any) -> str:
    """Marks each word with a hyphen in inline code, behind which a browser would break."""
    return _CODE.sub(lambda code: f"<code>{whole(code[1])}</code>", content)


def whole(code: str) -> str:
    """The code with its hyphened words marked.

    Examples:
        >>> whole("python -m benchmarks")
        'python <span class="whole">-m</span> benchmarks'
    """
    return _HYPHENED.sub(lambda word: f'<span class="whole">{word[0]}</span>', code)
