"""Reading prompt tables with Ray Data: every cell becomes text, every row keeps its place."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import ray
import ray.data
from ray.exceptions import RayError

from sdbatch.errors import InputError, StoreAway
from sdbatch.prompts import SLICE_ROWS, InputFile, Table, template_columns
from sdbatch.spec import Input, JobSpec
from sdbatch.storage import filesystem, is_away, open_file, unsigned

Row = dict[str, str | None]

#: No line of a table may be longer than this.
_BLOCK_BYTES = 8 << 20
_TOO_LONG = f"a row has more than {_BLOCK_BYTES >> 20} MiB; shorten it, or close the quote it opens"
_LINE = "line"
_SLICE_IMAGES = 16 * SLICE_ROWS
#: How much of a JSONL file is looked at to learn its columns.
_HEAD_BYTES = 1 << 20


def read_slices(spec: JobSpec, table: Table, planned: Sequence[int] = (), images_a_row: int = 1) -> Iterator[pa.Table]:
    """The rows of the table in order: slices of as many rows as ``planned`` says, then of SLICE_ROWS.

    Of rows that make many images a slice has fewer, for whoever plans it holds them all. Columns, all of text, have the
    spec's field names, ``keep:NAME`` for kept columns, ``word:NAME`` for those of the template, and ``fault`` where a
    row is unreadable. The last slice may be shorter. Raises InputError for a file that can't be read or lacks a column,
    and StoreAway where its store is out of reach.
    """
    rows = max(min(SLICE_ROWS, _SLICE_IMAGES // images_a_row), 1)
    return _read(spec.input, table, check_columns(spec, table), chain(planned, repeat(rows)))


def read_ids(source: Input, table: Table, rows: int) -> Iterator[pa.Table]:
    """The column ``id`` alone, so many rows at a time."""
    return (read.select(["id"]) for read in _read(source, table, {"id": source.columns["id"]}, repeat(rows)))


def _read(source: Input, table: Table, wanted: Mapping[str, str], sizes: Iterator[int]) -> Iterator[pa.Table]:
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.target_max_block_size = 2 * _BLOCK_BYTES  # whoever reads holds several blocks, and copies of them
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    to_text = partial(_to_text, wanted=wanted, form=table.format)
    try:
        dataset = _dataset(table, wanted).map_batches(to_text, batch_format="pyarrow", batch_size=SLICE_ROWS)
        batches: Iterable[Any] = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
        yield from _cut(batches, sizes, math.inf if source.limit is None else source.limit)
    except (RayError, OSError, ValueError, pa.ArrowException) as error:
        told = f"input.uri: {source.uri} can't be read: {_remedy(error, table, sorted(set(wanted.values())))}"
        raise (StoreAway if is_away(told) else InputError)(told) from None


def _cut(batches: Iterable[pa.Table], sizes: Iterator[int], left: float) -> Iterator[pa.Table]:
    """The first ``left`` rows, whatever batches they come in, in tables of these sizes."""
    size, held, rows = next(sizes), list[pa.Table](), 0
    for batch in batches:
        while len(batch) and left > 0:
            part = batch.slice(0, int(min(size - rows, left)))
            batch = batch.slice(len(part))
            held.append(part)
            rows, left = rows + len(part), left - len(part)
            if rows == size:
                yield pa.concat_tables(held)
                size, held, rows = next(sizes), [], 0
        if left <= 0:
            break
    if held:
        yield pa.concat_tables(held)


def check_columns(spec: JobSpec, table: Table) -> dict[str, str]:
    """What is read of the table: field → column.

    Raises InputError if the first file can't be opened or lacks a column that the spec names.
    """
    first = table.files[0]
    try:
        if compressed := _compressed(table, first):
            raise InputError(f"input.uri: {compressed}")
        names = _column_names(table.format, first)
    except (OSError, ValueError, pa.ArrowException) as error:
        told = _TOO_LONG if _is_too_long(str(error), table) else unsigned(str(error))
        raise InputError(f"input.uri: {first.uri} can't be read as {table.format}: {told}") from None
    wanted = _wanted_columns(spec, names)
    for field, column in wanted.items():
        kind, _, name = field.rpartition(":")
        where = {"keep": f"input.keep: {name}", "word": "prompt.template"}.get(kind, f"input.columns.{field}")
        if field == "template":
            where = "prompt.template_column"
        if names.count(column) == 0:
            raise InputError(f"{where}: {first.name} has no column {column!r}; it has: {', '.join(map(repr, names))}")
        if names.count(column) > 1:
            raise InputError(f"{where}: {first.name} has {names.count(column)} columns {column!r}; rename all but one")
    return wanted


def _wanted_columns(spec: JobSpec, names: Sequence[str]) -> dict[str, str]:
    """Field (or ``keep:NAME``, ``word:NAME``) → the table's column; ``names`` are all that it has."""
    source = spec.input
    fields = {**source.columns, **template_columns(spec, names)}
    if not spec.prompt.templated:
        fields = {"prompt": source.prompt_column, **fields}
    return fields | {f"keep:{name}": column for name, column in source.kept.items()}


def _column_names(form: str, file: InputFile) -> list[str]:
    """The columns of a table; of lines of JSON, every key in the first lines."""
    if form == "text":
        return ["prompt"]
    with open_file(file.uri) as opened:
        if form == "jsonl":
            head = opened.read(_HEAD_BYTES)
            if len(head) == _HEAD_BYTES and b"\n" not in head:
                head += opened.read(_BLOCK_BYTES)
                if b"\n" not in head and len(head) > _BLOCK_BYTES:
                    raise ValueError(_TOO_LONG)
            lines = head.splitlines()[: None if len(head) < _HEAD_BYTES else -1]
            found = [_json_object(line) for line in lines]
            return list(dict.fromkeys(key for keys in found if not isinstance(keys, str) for key in keys))
        if form == "parquet":
            return [str(name) for name in pq.read_schema(opened).names]
        options = pa.csv.ReadOptions(block_size=_BLOCK_BYTES)
        reader = pa.csv.open_csv(opened, read_options=options, parse_options=_parse_options(form))
        return [str(name) for name in reader.schema.names]


def _dataset(table: Table, wanted: Mapping[str, str]) -> ray.data.Dataset:
    located = [filesystem(file.uri) for file in table.files]
    files, paths = located[0][0], [path for _, path in located]
    columns = sorted(set(wanted.values()))
    if table.format == "parquet":
        dataset = ray.data.read_parquet(paths, filesystem=files, file_extensions=None, partitioning=None)
        return dataset.select_columns(columns)
    read, convert = _csv_options(table.format, columns)
    return ray.data.read_csv(
        paths,
        filesystem=files,
        partitioning=None,  # type: ignore[arg-type]
        read_options=read,
        parse_options=_parse_options(table.format),
        convert_options=convert,
    )


def _csv_options(form: str, columns: Sequence[str]) -> tuple[pa.csv.ReadOptions, pa.csv.ConvertOptions]:
    """Cells are read as bytes and decoded one by one, so that a bad one is its row's fault and nobody else's."""
    if form in {"csv", "tsv"}:
        kinds = {name: pa.binary() for name in columns}
        read = pa.csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False)
        return read, pa.csv.ConvertOptions(include_columns=columns, column_types=kinds)
    read = pa.csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False, column_names=[_LINE])
    return read, pa.csv.ConvertOptions(column_types={_LINE: pa.binary()})


def _parse_options(form: str) -> pa.csv.ParseOptions:
    if form == "csv":
        return pa.csv.ParseOptions(newlines_in_values=True)
    if form == "tsv":  # https://www.iana.org/assignments/media-types/text/tab-separated-values: nothing is quoted
        return pa.csv.ParseOptions(delimiter="\t", quote_char=False)
    return pa.csv.ParseOptions(delimiter="\x1f", quote_char=False)  # whole lines


def _to_text(batch: pa.Table, wanted: Mapping[str, str], form: str) -> pa.Table:
    """Rename columns to fields and turn every cell into text. Runs in Ray's workers."""
    if form != "jsonl":
        columns = {field: _decoded(batch.column(_LINE if form == "text" else name)) for field, name in wanted.items()}
        if None not in columns.values():
            return pa.table({**columns, "fault": pa.nulls(len(batch), pa.string())})
    if form in {"jsonl", "text"}:
        cells = batch.column(_LINE).to_pylist()
        rows = [_json_row(line, wanted) if form == "jsonl" else dict.fromkeys(wanted, line) for line in cells]
    else:
        cells_of = {field: _undecoded(batch.column(column)).to_pylist() for field, column in wanted.items()}
        rows = [dict(zip(cells_of, cells, strict=True)) for cells in zip(*cells_of.values(), strict=True)]
    texts = [_text_row(row, wanted) for row in rows]
    return pa.table({field: pa.array([row[field] for row in texts], pa.string()) for field in (*wanted, "fault")})


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """A column of nothing but good text, at once; None where cells must be looked at one by one."""
    raw = _undecoded(column)
    if raw.type != pa.binary():
        return None
    try:
        return raw.cast(pa.string())
    except pa.ArrowInvalid:
        return None


def _undecoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text as bytes: nobody has looked yet whether it is UTF-8."""
    return column.cast(pa.binary()) if pa.types.is_string(column.type) else column


def _json_row(line: bytes, wanted: Mapping[str, str]) -> dict[str, Any]:
    content = _json_object(line)
    if isinstance(content, str):
        return {"fault": content}
    return {field: content.get(column) for field, column in wanted.items()}


def _json_object(line: bytes) -> dict[str, Any] | str:
    """The object on a line of JSON, or why there is none."""
    try:
        content = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except UnicodeDecodeError:
        return "is not UTF-8 text"
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}"
    return content if isinstance(content, dict) else "is not a JSON object"


def _text_row(row: Mapping[str, Any], wanted: Mapping[str, str]) -> Row:
    """The row's cells as text, and its fault if one of them is none."""
    texts: Row = {"fault": row.get("fault")}
    for field in wanted:
        cell = row.get(field)
        if cell is None or (isinstance(cell, float) and math.isnan(cell)):
            texts[field] = None
        elif isinstance(cell, bytes):
            try:
                texts[field] = cell.decode("utf-8")
            except UnicodeDecodeError:
                texts[field] = cell.decode("utf-8", "replace")
                texts["fault"] = f"{field.removeprefix('keep:')} is not UTF-8 text"
        elif isinstance(cell, str):
            texts[field] = cell.encode("utf-8", "replace").decode()  # lone surrogates, which JSON can smuggle in
        elif isinstance(cell, bool | int | float | list | dict):
            texts[field] = json.dumps(cell, ensure_ascii=False, default=str)
        else:  # decimals, dates, UUIDs
            texts[field] = str(cell)
    return texts


#: What compressed files begin with.
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def _compressed(table: Table, file: InputFile) -> str | None:
    """What to tell of a file of lines that is compressed."""
    if table.format == "parquet":
        return None
    with open_file(file.uri) as opened:
        head = opened.read(8)
    for start, kind in _COMPRESSIONS.items():
        if head.startswith(start):
            return f"{file.uri} is compressed ({kind}); unpack it, and name the unpacked file"
    return None


def _remedy(error: BaseException, table: Table, columns: Sequence[str]) -> str:
    """What is wrong with which file, found by reading them here, one by one: Ray tells it in pages."""
    for file in table.files:
        try:
            if compressed := _compressed(table, file):
                return compressed
            _read_through(table.format, file, columns)
        except (OSError, ValueError, pa.ArrowException) as broken:
            return f"{file.uri}: {_TOO_LONG if _is_too_long(str(broken), table) else unsigned(str(broken))}"
    return _root_cause(error)


def _read_through(form: str, file: InputFile, columns: Sequence[str]) -> None:
    with open_file(file.uri) as opened:
        if form == "parquet":
            batches: Iterable[Any] = pq.ParquetFile(opened).iter_batches(columns=columns)
        else:
            read, convert = _csv_options(form, columns)
            batches = pa.csv.open_csv(opened, read, _parse_options(form), convert)
        for _ in batches:
            continue


def _is_too_long(told: str, table: Table) -> bool:
    """Is this what Arrow says of a row longer than a block? Of the first one it may say that nothing is there."""
    large = any(file.bytes > _BLOCK_BYTES for file in table.files)
    return "straddling object" in told or (large and "Empty CSV file or block" in told)


def _root_cause(error: BaseException) -> str:
    """The message of the error at the bottom, without Ray's traceback."""
    messages = [str(error)]
    while (below := getattr(error, "cause", None) or error.__cause__) is not None and below is not error:
        error = below
        messages.append(str(error))
    told = [" ".join(message.split()) for message in messages if "Traceback" not in message and message]
    return unsigned(" ".join(told[-2:]) if told else messages[-1].strip().splitlines()[-1])
