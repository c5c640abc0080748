"""Captions as they are stored: text files, JSON beside a picture, tables that name pictures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch.errors import InputError

#: Tables that hold captions, by file name.
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
#: Their columns, and keys of JSON, for captions: the first that is there counts.
CAPTIONS = ("text", "caption", "prompt")

_OUTCOME = ("path", "prompt", "status")


def text_file(path: Path) -> str:
    """The caption in a text file; nothing if it can't be read."""
    try:
        return text_caption(path.read_bytes())
    except OSError:
        return ""


def text_caption(data: bytes) -> str:
    """The caption that is the whole text; nothing if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return ""


def json_caption(data: bytes) -> str:
    """The caption in a JSON object; nothing if there is none."""
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    return _text_of(told, CAPTIONS) if isinstance(told, dict) else ""


def table_rows(table: Path) -> list[tuple[str, str]]:
    """File name and caption of every row of a metadata file, "" where a cell is empty.

    Raises InputError for files that can't be read, and for those without a column for either.
    """
    read = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}[table.suffix]
    try:
        columns, rows = read(table)
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise InputError(f"{table} can't be read: {error}") from None
    captions = [name for name in CAPTIONS if name in columns]
    if "file_name" not in columns or not captions:
        raise InputError(
            f"{table} should have the columns 'file_name' and one of {', '.join(map(repr, CAPTIONS))}; "
            f"it has {', '.join(map(repr, columns)) or 'none'}"
        )
    return [(_text_of(row, ("file_name",)), _text_of(row, captions[:1])) for row in rows]


def job_tables(folder: Path) -> list[Path]:
    """The metadata tables of a job's output; none if ``folder`` is something else."""
    tables = sorted(folder.glob("metadata/*.parquet"))
    try:
        return tables if tables and {*_OUTCOME} <= {*pq.read_schema(tables[0]).names} else []
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{tables[0]} can't be read: {error}") from None


def job_rows(table: Path) -> Iterator[tuple[str, str]]:
    """Path and prompt of every picture that a job made."""
    try:
        rows = pq.read_table(table, columns=list(_OUTCOME), partitioning=None).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{table} can't be read: {error}") from None
    for row in rows:
        if row["status"] == "committed":
            yield _text_of(row, ("path",)), _text_of(row, ("prompt",))


# -- kinds of tables: names of the columns; rows -----------------------------------------------------------


def _csv(table: Path) -> tuple[list[str], list[dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(table.read_bytes().decode("utf-8-sig"), newline=""), strict=True)
    rows = list(reader)
    return list(reader.fieldnames or ()), rows


def _jsonl(table: Path) -> tuple[list[str], list[dict[str, Any]]]:
    rows = []
    for number, line in enumerate(table.read_bytes().decode("utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object")
            rows.append(row)
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def _parquet(table: Path) -> tuple[list[str], list[dict[str, Any]]]:
    columns = pq.read_schema(table).names
    wanted = [name for name in ("file_name", *CAPTIONS) if name in columns]
    return columns, pq.read_table(table, columns=wanted, partitioning=None).to_pylist()


def _text_of(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """What stands under the first of the names that is there, if it is text."""
    found = next((row[name] for name in names if name in row), "")
    return found.strip() if isinstance(found, str) else ""
