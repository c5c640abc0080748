"""The metadata table: one row an image, made or quarantined."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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

#: Columns that only storing a picture, or failing to make it, fills in.
_OUTCOME = ("path", "bytes", "sha256", "status", "error")


def description(row: Mapping[str, Any]) -> dict[str, Any]:
    """What of a metadata row describes the picture itself, wherever it is stored."""
    return {name: value for name, value in row.items() if name not in _OUTCOME}


def description_fields(row: Mapping[str, Any]) -> list[tuple[str, pa.DataType]]:
    """Name and type of each field of a row's description; the user's columns are text."""
    ours = dict(COLUMNS)
    return [(name, ours.get(name, pa.string())) for name in description(row)]


def metadata_key(stem: str) -> str:
    return f"metadata/{stem}.parquet"


def encode_metadata(
    rows: Iterable[Mapping[str, Any]],
    kept: Sequence[str],
    *,
    templated: bool = False,
    objects: Mapping[str, str] | None = None,
) -> bytes:
    """The table as a Parquet file; kept columns follow ours, as text.

    Templates have a column where there are any: an output that was begun before there were keeps its schema.
    ``objects``, key → sha256 of what the shard has beside single pictures, goes into the file's own key-value metadata.
    """
    template = [_TEMPLATE] if templated else []
    schema = pa.schema([*COLUMNS, *template, *((name, pa.string()) for name in kept)])
    if objects:
        schema = schema.with_metadata({"sdbatch.objects": json.dumps(dict(objects), sort_keys=True)})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def decode_metadata(data: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(data)).to_pylist()
    return rows
