"""What columns hold, in the words of Hugging Face data sets: which of them are pictures.

A Parquet file says so in its own key-value metadata, under ``huggingface``, as the library ``datasets`` writes it; a
data card in its front matter.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import pyarrow as pa

_NAMES = {pa.float64(): "float64", pa.float32(): "float32"}


def with_features(schema: pa.Schema, images: Collection[str]) -> pa.Schema:
    """The schema with the features of its columns in its metadata; ``images`` hold pictures."""
    features = {field.name: {"_type": "Image"} if field.name in images else _feature(field.type) for field in schema}
    told: dict[str, Any] = {"info": {"features": features}}
    return schema.with_metadata({**(schema.metadata or {}), "huggingface": json.dumps(told)})


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "Sequence"}
    return {"dtype": dtype(kind), "_type": "Value"}


def dtype(kind: pa.DataType) -> str:
    """The name of a plain Arrow type in a data set."""
    return _NAMES.get(kind, str(kind))
