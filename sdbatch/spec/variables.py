"""Variables in a job spec: what a scheduled job's name and addresses are filled in with, once, as it is read.

A day begins and ends in UTC. ``{{`` and ``}}`` stand for braces themselves.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from typing import Any

from sdbatch.errors import Problem
from sdbatch.spec.words import plain, shown, suggest

_BRACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
#: Where variables may stand; a number of a list is written as *.
_FIELDS = ("input.uri", "model.uri", "model.tokenizer", "model.loras.*.uri", "model.embeddings.*.uri", "output.uri")


def today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()


def literal(text: str) -> str:
    """The text as it has to be written where variables may stand."""
    return text.replace("{", "{{").replace("}", "}}")


def filled_in(raw: dict[str, Any], date: datetime.date) -> tuple[dict[str, Any], list[Problem]]:
    """The spec as it was written, with its variables filled in, and what is wrong with them."""
    known = {
        "date": date.isoformat(),
        "year": f"{date:%Y}",
        "month": f"{date:%m}",
        "day": f"{date:%d}",
        "week": f"{date:%G-W%V}",
    }
    problems: list[Problem] = []

    def fill(value: Any, field: str) -> Any:
        if not isinstance(value, str):
            return value  # that it is no text is told elsewhere

        def put(found: re.Match[str]) -> str:
            if found[0] in {"{{", "}}"}:
                return found[0][0]
            if found[1] in known:
                return known[found[1]]
            if found[1] is None:
                problems.append(Problem(field, f"has a single {found[0]}", f"write {found[0] * 2} for a brace"))
            else:
                there_is = suggest(found[1], list(known))
                problems.append(Problem(field, f"knows no variable {shown(plain(found[1]))}", there_is))
            return found[0]

        return _BRACE.sub(put, value)

    raw = {**raw}
    if "name" in raw:
        raw["name"] = fill(raw["name"], "name")
        known = {"name": raw["name"] if isinstance(raw["name"], str) else "", **known}
    for field in _FIELDS:
        first, *rest = field.split(".")
        if first in raw:
            raw[first] = _at(raw[first], rest, field, fill)
    return raw, problems


def _at(value: Any, place: list[str], field: str, fill: Callable[[Any, str], Any]) -> Any:
    """A copy of ``value`` with what lies at ``place`` filled in."""
    if not place:
        return fill(value, field)
    key, *rest = place
    if key == "*" and isinstance(value, list):
        return [_at(item, rest, field.replace("*", str(number), 1), fill) for number, item in enumerate(value)]
    if isinstance(value, dict) and key in value:
        return {**value, key: _at(value[key], rest, field, fill)}
    return value
