"""Templates of prompts: text with columns, choices and wildcards, read into parts.

    {product}                 the cell of that column, or the matrix' value of that name
    {red|blue}                one of these
    {surface|table}           the column's cell if there is such a column and it holds something, else one of the others
    {3::red|blue}             red three times as often
    {2$$a|b|c}                two of these, joined by ", "; {1-2$$…} one or two; {2$$ and $$a|b|c} joined by " and "
    __colours__               a line of colours.txt; __animals/cats__ of animals/cats.txt; * stands for any name
    \\{ \\} \\| \\_               the character itself; a backslash before any other is one: \\( stays for emphasis

Choices may stand in choices, and in the lines of wildcard files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MOST_NESTED = 20
_MOST_TAKEN = 20
#: A wildcard's name. Two underscores around something else are text.
_WILDCARD = re.compile(r"__([A-Za-z0-9*](?:[A-Za-z0-9_./*-]*?[A-Za-z0-9*])?)__")
_ESCAPED = ("{", "}", "|", "_")
_HEAD = re.compile(r"\s*(\d{1,3})(?:\s*-\s*(\d{1,3}))?\s*\$\$")
_WEIGHT = re.compile(r"\s*(\d{1,6}(?:\.\d{1,6})?)::")


class BadTemplate(ValueError):
    """A template that can't be read; the message says where."""


@dataclass(frozen=True)
class Column:
    """The cell of a column, or the value of a matrix."""

    name: str


@dataclass(frozen=True)
class Wildcard:
    """A line of a file. ``name`` may hold ``*``."""

    name: str


@dataclass(frozen=True)
class Option:
    """One possibility of a choice, or a line of a wildcard file."""

    weight: float
    parts: Template

    @property
    def text(self) -> str | None:
        """What it says, if it is nothing but text."""
        return "".join(part for part in self.parts if isinstance(part, str)) if self.plain else None

    @property
    def plain(self) -> bool:
        return all(isinstance(part, str) for part in self.parts)


@dataclass(frozen=True)
class Choice:
    """``low`` to ``high`` of the options, none of them twice. ``counted``: the template said how many."""

    options: tuple[Option, ...]
    low: int = 1
    high: int = 1
    separator: str = ", "
    counted: bool = False

    @property
    def perhaps_column(self) -> str | None:
        """The first option, if it could be a column that the others stand in for."""
        first = self.options[0]
        return None if self.counted or first.weight != 1 or first.text is None else first.text.strip() or None


Template = tuple[str | Column | Wildcard | Choice, ...]


def parse(text: str) -> Template:
    """Read a template. Raises BadTemplate."""
    parts, end = _parts(text, 0, 0)
    if end < len(text):
        raise BadTemplate(f"character {end + 1} is a '}}' that closes nothing; write \\}} for the character itself")
    return parts


def parse_option(text: str) -> Option:
    """Read a line of a wildcard file, which may begin with a weight. Raises BadTemplate."""
    weight, start = _weight(text, 0)
    return Option(weight, parse(text[start:]))


def inner_parts(template: Template) -> Iterator[Column | Wildcard | Choice]:
    """Every part that is not text, at any depth."""
    for part in template:
        if isinstance(part, str):
            continue
        yield part
        if isinstance(part, Choice):
            for option in part.options:
                yield from inner_parts(option.parts)


def _parts(text: str, start: int, depth: int) -> tuple[Template, int]:
    """The parts from ``start`` to the end of the text, or of the option that they are in."""
    parts: list[str | Column | Wildcard | Choice] = []
    said, at = "", start
    while at < len(text):
        char = text[at]
        if char == "\\" and text[at + 1 : at + 2] in _ESCAPED:
            said, at = said + text[at + 1], at + 2
            continue
        wildcard = _WILDCARD.match(text, at)
        if (depth and char == "|") or char == "}":
            break
        if char != "{" and wildcard is None:
            said, at = said + char, at + 1
            continue
        if said:
            parts.append(said)
            said = ""
        if wildcard is not None:
            parts.append(Wildcard(wildcard[1]))
            at = wildcard.end()
        else:
            part, at = _braces(text, at, depth + 1)
            parts.append(part)
    if said:
        parts.append(said)
    return tuple(parts), at


def _braces(text: str, opened: int, depth: int) -> tuple[Column | Choice, int]:
    """What stands in the braces that open at ``opened``, and where the text goes on."""
    if depth > MOST_NESTED:
        raise BadTemplate(f"character {opened + 1} opens braces within more than {MOST_NESTED} others")
    at, low, high, separator = opened + 1, 1, 1, ", "
    head = _HEAD.match(text, at)
    if head is not None:
        low = int(head[1])
        high, at = int(head[2] or low), head.end()
        before, dollars, _ = text[at:].partition("$$")
        if dollars and not re.search(r"[|{}]", before):
            separator, at = before, at + len(before) + 2
    options: list[Option] = []
    while True:
        weight, at = _weight(text, at)
        parts, at = _parts(text, at, depth)
        options.append(Option(weight, parts))
        if at == len(text):
            raise BadTemplate(f"the '{{' at character {opened + 1} is not closed; write \\{{ for the character itself")
        at += 1
        if text[at - 1] == "}":
            break
    only = options[0].text if len(options) == 1 and head is None and options[0].weight == 1 else None
    if only is not None:
        if not only.strip():
            raise BadTemplate(f"the braces at character {opened + 1} hold nothing")
        return Column(only.strip()), at
    if high > _MOST_TAKEN:
        raise BadTemplate(f"the braces at character {opened + 1} ask for {high} options; at most {_MOST_TAKEN}")
    if not low <= high <= len(options):
        raise BadTemplate(f"the braces at character {opened + 1} ask for {low} to {high} of {len(options)} options")
    if all(option.weight == 0 for option in options):
        raise BadTemplate(f"the braces at character {opened + 1} give all their options no weight")
    return Choice(tuple(options), low, high, separator, counted=head is not None), at


def _weight(text: str, at: int) -> tuple[float, int]:
    found = _WEIGHT.match(text, at)
    return (float(found[1]), found.end()) if found else (1.0, at)
