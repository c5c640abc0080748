"""What a page can say of the columns of a metadata table: values to filter by, distributions of numbers."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

#: Columns of the table that are the same for every job; the others are the user's, and scores.
PARAMETERS = (
    "prompt",
    "template",
    "negative_prompt",
    "seed",
    "width",
    "height",
    "num_inference_steps",
    "guidance_scale",
    "sampler",
    "init_image",
    "mask_image",
    "strength",
    "truncated",
    "model",
)
OURS = (*PARAMETERS, "image_id", "row_id", "shard", "model_sha256", "path", "bytes", "sha256", "status", "error")
#: Columns of checks that name a picture, or nearly.
_NAMING = ("phash", "duplicate_of")
_FILTERS = ("template", "sampler", "num_inference_steps", "guidance_scale", "strength", "truncated")
_MOST_VALUES, _MOST_FILTERS, _FEW = 30, 12, 12
_BINS, _MOST_DISTRIBUTIONS = 24, 12


def others(table: pa.Table) -> list[str]:
    """Columns that are not the same for every job."""
    return [name for name in table.column_names if name not in {*OURS, "position"}]


def numbers(column: pa.ChunkedArray) -> np.ndarray | None:
    """The values as numbers, NaN where there is none; None for a column that holds anything else."""
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        found: np.ndarray = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return found
    if not pa.types.is_string(column.type):
        return None
    values = np.full(len(column), math.nan)
    for place, cell in enumerate(column.to_pylist()):
        if cell and cell.strip():
            try:
                values[place] = float(cell)
            except ValueError:
                return None
    return values if np.isfinite(values).any() else None


def distributions(table: pa.Table) -> list[dict[str, Any]]:
    """Histograms of the columns that hold many different numbers."""
    found: list[dict[str, Any]] = []
    for name in others(table):
        values = numbers(table.column(name))
        if values is None or len(found) == _MOST_DISTRIBUTIONS:
            continue
        values = values[np.isfinite(values)]
        if len(np.unique(values)) <= _FEW:
            continue
        counts, edges = np.histogram(values, _BINS)
        found.append(
            {
                "name": name,
                "low": float(edges[0]),
                "high": float(edges[-1]),
                "counts": counts.tolist(),
                "median": float(np.median(values)),
                "mean": float(values.mean()),
                "of": len(values),
            }
        )
    return found


def filters(table: pa.Table) -> list[dict[str, Any]]:
    """Columns with a few different values, which come up twice or more on average, each with how often it is there."""
    found, most = list[dict[str, Any]](), min(_MOST_VALUES, len(table) // 2)
    sizes = Counter(
        f"{width}×{height}"
        for width, height in zip(table.column("width").to_pylist(), table.column("height").to_pylist(), strict=True)
    )
    columns = {
        name: Counter(table.column(name).to_pylist())
        for name in (*_FILTERS, *others(table))
        if name not in _NAMING and name in table.column_names and not pa.types.is_list(table.schema.field(name).type)
    }
    for name, counts in {"size": sizes, **columns}.items():
        if 1 < len(counts) <= most and len(found) < _MOST_FILTERS:
            values = sorted(counts.items(), key=lambda pair: (-pair[1], str(pair[0])))
            found.append({"name": name, "values": [[text(value), count] for value, count in values]})
    return found


def text(value: Any) -> str:
    """A cell as the page compares and shows it."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " · ".join(text(one) or "–" for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
