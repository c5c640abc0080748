"""What the site needs beyond Markdown: formulas as MathML, and no links out of the documentation into the code."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

_CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)
_DISPLAY = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
_INLINE = re.compile(r"\$([^$\n]+)\$")
_INTO_THE_CODE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+(?!docs/)[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """ProperDocs calls this for each page; code stays as it is."""
    parts = _CODE.split(markdown)
    parts[::2] = [_with_formulas(text) for text in parts[::2]]
    return _INTO_THE_CODE.sub(r"\1", "".join(parts))


def _with_formulas(text: str) -> str:
    text = _DISPLAY.sub(lambda found: convert(found[1].strip(), display="block"), text)
    return _INLINE.sub(lambda found: convert(found[1]), text)
