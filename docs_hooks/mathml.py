"""Turns the LaTeX in pages into MathML while they are built, so that no page needs a script."""

import html
import re
from typing import Any

from math_core import LatexToMathML

# What pymdownx.arithmatex leaves in place of inline and of displayed mathematics.
_INLINE = re.compile(r'<span class="arithmatex">\\\((.+?)\\\)</span>', re.DOTALL)
_DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.+?)\\\]\s*</div>', re.DOTALL)

_CONVERTER = LatexToMathML(fancy_error=False)


def on_page_content(content: str, **_: Any) -> str:
    """Replaces every formula of a page; one that cannot be read fails the build."""
    content = _INLINE.sub(lambda match: _mathml(match[1], displaystyle=False), content)
    return _DISPLAY.sub(lambda match: _boxed(_mathml(match[1], displaystyle=True)), content)


def _boxed(formula: str) -> str:
    """In a box that scrolls where the page is narrower, and that a keyboard reaches."""
    return f'<div class="equation" tabindex="0">{formula}</div>'


def _mathml(formula: str, *, displaystyle: bool) -> str:
    latex = html.unescape(formula.strip())
    return _CONVERTER.convert_with_local_state(latex, displaystyle=displaystyle)
