"""The reference pages, written from the code: ``python docs/_site/reference.py``.

docs/reference/commands.md   every command and option, as Typer tells them
docs/reference/spec.md       every field of the job spec
"""

from __future__ import annotations

import html
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.cli import get_docs_for_click

from sdbatch.cli import app
from sdbatch.spec import JobSpec

_FOLDER = Path(__file__).parents[1] / "reference"
_EMPTY = {"{}", "[]", "''", '""'}


def commands() -> str:
    """The page on the command line."""
    command: Any = typer.main.get_command(app)
    context = typer.Context(command, info_name="sdbatch")
    text = html.unescape(get_docs_for_click(obj=command, ctx=context, name="sdbatch", title="Commands"))
    return "\n".join(line.rstrip() for line in text.splitlines()).strip() + "\n"


def spec() -> str:
    """The page on the job spec."""
    lines = [
        "# The job spec",
        "",
        "A job spec is a YAML file. Unknown fields are errors, and so is a field that is there twice;",
        "`sdbatch validate` tells every mistake at once. `--set SECTION.FIELD=VALUE` overrides a field on the command",
        "line.",
        "",
    ]
    for place, section in [("", JobSpec), *_sections(JobSpec, "")]:
        lines += [f"## {place or 'Top level'}", "", " ".join((section.__doc__ or "").split()), ""]
        lines += ["| field | value | default | |", "| --- | --- | --- | --- |"]
        lines += [_row(place, name, field) for name, field in section.model_fields.items()]
        lines.append("")
    return "\n".join(lines)


def _sections(model: type[BaseModel], place: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section below ``model`` with its dotted place, in the order of the fields."""
    for name, field in model.model_fields.items():
        for kind in _sections_in(field.annotation):
            inner = f"{place}.{name}".lstrip(".") + ("[]" if get_origin(field.annotation) is list else "")
            yield inner, kind
            yield from _sections(kind, inner)


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    found = [annotation, *get_args(annotation)]
    return [kind for kind in found if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _row(place: str, name: str, field: FieldInfo) -> str:
    told = field.description or ""
    inner = _sections_in(field.annotation)
    if inner and not told:
        told = " ".join((inner[0].__doc__ or "").split())
    default = "required" if field.is_required() else _default(field)
    return f"| `{name}` | {_kind(field)} | {default} | {_cell(told)} |"


def _kind(field: FieldInfo) -> str:
    bounds = {
        "ge": "≥ {}",
        "gt": "> {}",
        "le": "≤ {}",
        "lt": "< {}",
        "min_length": "at least {} characters",
        "max_length": "at most {} characters",
        "pattern": "`{}`",
    }
    told = [
        words.format(_cell(str(value)))
        for rule in field.metadata
        for name, words in bounds.items()
        if (value := getattr(rule, name, None)) is not None and value != 1 << 63
    ]
    if field.annotation is str and "at least 1 characters" in told:
        told.remove("at least 1 characters")
    return ", ".join([_type(field.annotation), *told])


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in {Union, types.UnionType}:
        return " or ".join(_type(kind) for kind in inner if kind is not type(None))
    if origin is list:
        return "list of sections" if _sections_in(annotation) else f"list of {_type(inner[0])}"
    if origin is dict:
        return f"mapping to {_type(inner[1])}"
    if origin is tuple:
        return f"{len(inner)} of {_type(inner[0])}"
    if origin is not None:  # Annotated
        return _type(inner[0])
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(annotation, "any value")


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or isinstance(value, BaseModel) or repr(value) in _EMPTY:
        return ""
    shown = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
    return f"`{shown or (list(value) if isinstance(value, tuple) else value)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    _FOLDER.mkdir(exist_ok=True)
    (_FOLDER / "commands.md").write_text(commands(), encoding="utf-8")
    (_FOLDER / "spec.md").write_text(spec(), encoding="utf-8")
