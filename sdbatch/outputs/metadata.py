"""The metadata table: one row an image, made or quarantined."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch.spec import Checks
from sdbatch.storage.parquet import read_parquet

COLUMNS: list[tuple[str, pa.DataType]] = [
    ("image_id", pa.string()),
    ("row_id", pa.string()),
    ("shard", pa.int32()),
    ("prompt", pa.string()),
    ("negative_prompt", pa.string()),
    ("seed", pa.int64()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("num_inference_steps", pa.int32()),
    ("guidance_scale", pa.float64()),
    ("sampler", pa.string()),
    ("init_image", pa.string()),
    ("mask_image", pa.string()),
    ("strength", pa.float64()),
    ("truncated", pa.bool_()),
    ("model", pa.string()),
    ("model_sha256", pa.string()),
    ("path", pa.string()),
    ("bytes", pa.int64()),
    ("sha256", pa.string()),
    ("status", pa.string()),
    ("error", pa.string()),
]

_TEMPLATE = ("template", pa.string())

#: Columns that checks fill in.
_CHECKS: dict[str, pa.DataType] = {
    "failed_checks": pa.string(),  # their names; "" where none failed
    "clip_score": pa.float64(),
    "contrast": pa.float64(),
    "phash": pa.string(),
    "duplicate_of": pa.string(),
    "unsafe_score": pa.float64(),
    "unsafe_concept": pa.string(),
    "rerolls": pa.int32(),
    "seeds_tried": pa.list_(pa.int64()),
    "failed_tried": pa.list_(pa.string()),
    "scores_tried": pa.list_(pa.float64()),
}
#: Name → type of the columns that a job's checks fill in.
CheckColumns = Mapping[str, pa.DataType]
NO_CHECKS: CheckColumns = {}

#: Columns that only storing a picture, or failing to make it, fills in.
_OUTCOME = ("path", "bytes", "sha256", "status", "error")


def description(row: Mapping[str, Any]) -> dict[str, Any]:
    """What of a metadata row describes the picture itself, wherever it is stored."""
    return {name: value for name, value in row.items() if name not in _OUTCOME}


def check_columns(checks: Checks | None) -> CheckColumns:
    """The columns that a job has for its checks."""
    return NO_CHECKS if checks is None else {name: _CHECKS[name] for name in checks.columns}


def description_fields(row: Mapping[str, Any], checked: CheckColumns) -> list[tuple[str, pa.DataType]]:
    """Name and type of each field of a row's description; the user's columns are text."""
    ours = dict(COLUMNS) | dict(checked)
    return [(name, ours.get(name, pa.string())) for name in description(row)]


def metadata_key(stem: str) -> str:
    return f"metadata/{stem}.parquet"


def encode_metadata(
    rows: Iterable[Mapping[str, Any]],
    kept: Sequence[str],
    *,
    templated: bool = False,
    checked: CheckColumns = NO_CHECKS,
    objects: Mapping[str, str] | None = None,
) -> bytes:
    """The table as a Parquet file; kept columns follow ours, as text, and then those that checks fill in.

    Templates have a column where there are any: an output that was begun before there were keeps its schema.
    ``objects``, key → sha256 of what the shard has beside single pictures, goes into the file's own key-value metadata.
    """
    template = [_TEMPLATE] if templated else []
    schema = pa.schema([*COLUMNS, *template, *((name, pa.string()) for name in kept), *checked.items()])
    return metadata_of(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), objects or {})


def metadata_of(table: pa.Table, objects: Mapping[str, str]) -> bytes:
    """A table of metadata as a Parquet file, with what the shard has beside single pictures."""
    if objects:
        table = table.replace_schema_metadata({"sdbatch.objects": json.dumps(dict(objects), sort_keys=True)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def decode_metadata(data: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_parquet(data).to_pylist()
    return rows
