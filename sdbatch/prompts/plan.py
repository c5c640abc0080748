"""From a slice of the table to shards: pure functions on rows.

A slice is a fixed run of rows. Its requests are grouped by shape, in the order in which the shapes first
occur, and cut into shards; so what a shard holds depends on the rows of its slice and the spec alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sdbatch.prompts.expansion import Wildcards
from sdbatch.prompts.request import SIZE_STEP, ImageRequest, ModelFacts, Shape, requests_of_row
from sdbatch.prompts.variants import Variants
from sdbatch.spec import JobSpec

SLICE_ROWS = 16_384
_RESERVED = "row:"

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
_TEMPLATE = ("template", pa.string())


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
    """Gives every row its id: the mapped column's cell, or the row's number; refuses empty and double ones.

    ``doubles``: rows whose id an earlier row has → the first such row, as :func:`doubled_ids` finds them.
    """

    def __init__(self, mapped: bool, doubles: Mapping[int, int] = MappingProxyType({})) -> None:
        self._mapped, self._doubles = mapped, doubles

    def __call__(self, cell: str | None, index: int) -> tuple[str, str | None]:
        """The row's id and, if the cell is no good, the fault; faulty rows get an id that no cell can claim."""
        number = f"{index:08d}"
        if not self._mapped:
            return number, None
        name = cell or ""
        if not name:
            return f"row:{number}", "the id is empty"
        if name.startswith(_RESERVED):
            return f"row:{number}", f"the id {name!r} begins with 'row:', which is reserved"
        if index in self._doubles:
            return f"row:{number}", f"the id {name!r} is row {self._doubles[index] + 1}'s already"
        return name, None


def usable_ids(ids: pa.ChunkedArray, first_index: int) -> pa.Table:
    """The cells of consecutive rows that can be ids, with their ``row``: neither empty nor reserved."""
    table = pa.table({"id": ids, "row": pa.array(range(first_index, first_index + len(ids)), pa.int64())})
    usable = pc.and_(pc.not_equal(ids, ""), pc.invert(pc.starts_with(ids, _RESERVED)))
    return table.filter(usable)  # a null is not true either


def doubled_ids(usable: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Of ids and their rows the first of each id, and the ``row`` of every other with the ``first`` row of its id."""
    firsts = usable.group_by("id").aggregate([("row", "min")]).rename_columns(["id", "row"])
    if len(firsts) == len(usable):
        return usable, pa.table({"row": pa.array([], pa.int64()), "first": pa.array([], pa.int64())})
    first = firsts.column("row").take(pc.index_in(usable.column("id"), firsts.column("id")))
    doubled = pc.not_equal(usable.column("row"), first)
    doubles = pa.table({"row": usable.column("row"), "first": first}).filter(doubled)
    return usable.filter(pc.invert(doubled)), doubles


def rows_sha256(rows: pa.Table) -> str:
    """A digest of rows that any change to a cell changes."""
    digest = hashlib.sha256()
    for name in rows.column_names:
        digest.update(json.dumps([name, rows.column(name).to_pylist()]).encode())
    return digest.hexdigest()


def requests_of_slice(
    rows: Iterable[Mapping[str, Any]],
    first_index: int,
    spec: JobSpec,
    model: ModelFacts,
    ids: RowIds,
    wildcards: Wildcards = MappingProxyType({}),
) -> Iterator[ImageRequest]:
    """All requests of consecutive rows, in order. Row ``first_index`` of the table comes first."""
    variants = Variants(spec, wildcards)
    for index, row in enumerate(rows, first_index):
        row_id, fault = ids(row.get("id"), index)
        yield from requests_of_row(row, index, spec, model, row_id, fault, variants)


def odd_sizes(requests: Iterable[ImageRequest], first_index: int) -> Iterator[OddSize]:
    """Requests whose size the model can't draw, one a row."""
    for index, (_, several) in enumerate(groupby(requests, lambda request: request.row_id), first_index):
        for request in several:
            if request.fault is None and (request.width % SIZE_STEP or request.height % SIZE_STEP):
                yield OddSize(index, request.width, request.height)
                break


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


def to_table(requests: Sequence[ImageRequest], kept: Iterable[str], templated: bool = False) -> pa.Table:
    """Requests as the plan stores them; kept columns become a struct, so that their names can't clash.

    Without templates there is no column of them: such plans have the bytes that they had before there were any.
    """
    kinds = [*_COLUMNS, _TEMPLATE] if templated else _COLUMNS
    columns = {name: pa.array([getattr(request, name) for request in requests], kind) for name, kind in kinds}
    names = list(kept)
    if names:
        struct = pa.struct([(name, pa.string()) for name in names])
        columns["kept"] = pa.array([request.kept or None for request in requests], struct)
    return pa.table(columns)


def from_table(table: pa.Table) -> list[ImageRequest]:
    """The requests that :func:`to_table` stored."""
    return [ImageRequest(**{**row, "kept": row.get("kept") or {}}) for row in table.to_pylist()]
