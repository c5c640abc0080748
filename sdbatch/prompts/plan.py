"""From a slice of the table to shards: pure functions on rows.

A slice is a fixed run of rows. Its requests are grouped by shape, in the order in which the shapes first
occur, and cut into shards; so what a shard holds depends on the rows of its slice and the spec alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sdbatch.prompts.request import SIZE_STEP, ImageRequest, ModelFacts, Shape, requests_of_row
from sdbatch.spec import JobSpec

SLICE_ROWS = 16_384

_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("image_id", pa.string()),
    ("row_id", pa.string()),
    ("prompt", pa.string()),
    ("negative_prompt", pa.string()),
    ("seed", pa.int64()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("num_inference_steps", pa.int32()),
    ("guidance_scale", pa.float64()),
    ("sampler", pa.string()),
    ("chunks", pa.int32()),
    ("init_image", pa.string()),
    ("mask_image", pa.string()),
    ("strength", pa.float64()),
    ("fault", pa.string()),
]


@dataclass(frozen=True)
class Run:
    """One shard's requests, all of one shape; ``shape`` is None for requests that can't be made."""

    requests: tuple[ImageRequest, ...]
    shape: Shape | None


@dataclass(frozen=True)
class OddSize:
    """A row whose size is no multiple of 8."""

    row: int
    width: int
    height: int


class RowIds:
    """Gives every row its id: the mapped column's cell, or the row's number; refuses empty and double ones."""

    def __init__(self, mapped: bool) -> None:
        self._mapped = mapped
        self._first: dict[str, int] = {}

    def __call__(self, cell: str | None, index: int) -> tuple[str, str | None]:
        """The row's id and, if the cell is no good, the fault; faulty rows get an id that no cell can claim."""
        number = f"{index:08d}"
        if not self._mapped:
            return number, None
        name = cell or ""
        if not name:
            return f"row:{number}", "the id is empty"
        if name.startswith("row:"):
            return f"row:{number}", f"the id {name!r} begins with 'row:', which is reserved"
        first = self._first.setdefault(name, index)
        if first != index:
            return f"row:{number}", f"the id {name!r} is row {first + 1}'s already"
        return name, None


def requests_of_slice(
    rows: Sequence[Mapping[str, Any]], first_index: int, spec: JobSpec, model: ModelFacts, ids: RowIds
) -> list[ImageRequest]:
    """All requests of consecutive rows, in order. Row ``first_index`` of the table comes first."""
    requests = []
    for index, row in enumerate(rows, first_index):
        row_id, fault = ids(row.get("id"), index)
        requests += requests_of_row(row, index, spec, model, row_id, fault)
    return requests


def odd_sizes(requests: Iterable[ImageRequest], first_index: int) -> Iterator[OddSize]:
    """Requests whose size the model can't draw, one a row."""
    seen, index = "", first_index - 1
    for request in requests:
        if request.row_id != seen:
            seen, index = request.row_id, index + 1
            if request.fault is None and (request.width % SIZE_STEP or request.height % SIZE_STEP):
                yield OddSize(index, request.width, request.height)


def cut(requests: Iterable[ImageRequest], shard_size: int) -> list[Run]:
    """Group by shape and cut into shards of ``shard_size``; what can't be made comes last."""
    groups: dict[Shape | None, list[ImageRequest]] = {}
    for request in requests:
        groups.setdefault(None if request.fault else request.shape, []).append(request)
    faulty = groups.pop(None, [])
    runs = [
        Run(tuple(group[start : start + shard_size]), shape)
        for shape, group in groups.items()
        for start in range(0, len(group), shard_size)
    ]
    runs += [Run(tuple(faulty[start : start + shard_size]), None) for start in range(0, len(faulty), shard_size)]
    return runs


def to_table(requests: Iterable[ImageRequest], kept: Iterable[str]) -> pa.Table:
    """Requests as the plan stores them; kept columns become a struct, so that their names can't clash."""
    rows = [
        {name: getattr(request, name) for name, _ in _COLUMNS} | {"kept": request.kept or None} for request in requests
    ]
    fields = [pa.field(name, kind) for name, kind in _COLUMNS]
    names = list(kept)
    if names:
        fields.append(pa.field("kept", pa.struct([(name, pa.string()) for name in names])))
    return pa.Table.from_pylist(rows, schema=pa.schema(fields))


def from_table(table: pa.Table) -> list[ImageRequest]:
    """The requests that :func:`to_table` stored."""
    return [ImageRequest(**{**row, "kept": row.get("kept") or {}}) for row in table.to_pylist()]
