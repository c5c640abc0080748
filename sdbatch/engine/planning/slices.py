"""The slices of a plan: each is made and stored by a task of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import pyarrow as pa
import ray

from sdbatch.engine.models.image_model import FoundModel
from sdbatch.engine.planning.ids import Doubles
from sdbatch.engine.planning.tasks import TASK, in_order
from sdbatch.ledger import Shard, Shards, SliceRows, write_slice
from sdbatch.prompts import (
    ImageRequest,
    OddSize,
    RowIds,
    Run,
    cut,
    odd_sizes,
    requests_of_slice,
    rows_sha256,
    to_table,
)
from sdbatch.prompts.expansion import Wildcards
from sdbatch.spec import JobSpec
from sdbatch.storage import open_store

#: Odd sizes that an error shows.
SHOWN = 5


@dataclass(frozen=True)
class Planning:
    """What all slices of a plan have in common."""

    spec: JobSpec
    model: FoundModel
    output: str  # the store's URI
    fingerprint: str
    wildcards: Wildcards


@dataclass(frozen=True)
class PlannedSlice:
    """What the driver must know of a slice; the requests are stored by then, unless there are odd sizes."""

    rows: SliceRows
    shards: Shards  # counted from 0
    planned: int
    faulty: int
    first_fault: str | None
    odd: int
    first_odd: tuple[OddSize, ...]


def plan_slice(
    planning: Planning, rows: pa.Table, number: int, first_row: int, doubles: dict[int, int]
) -> PlannedSlice:
    """Make the requests of slice ``number`` and store them. ``doubles`` are for RowIds."""
    spec = planning.spec
    ids = RowIds("id" in spec.input.columns, doubles)
    found = requests_of_slice(rows.to_pylist(), first_row, spec, planning.model.facts, ids, planning.wildcards)
    requests = list(found)
    odd = list(odd_sizes(requests, first_row))
    if spec.generate.long_prompts == "chunk":
        requests = _in_chunks(requests, planning)
    runs = cut(requests, spec.output.shard_size)
    if not odd:  # else no plan will come of it
        grouped = [request for run in runs for request in run.requests]
        table = to_table(grouped, spec.kept, spec.prompt.templated)
        write_slice(open_store(planning.output), planning.fingerprint, number, table)
    faults = [request.fault for request in requests if request.fault is not None]
    return PlannedSlice(
        rows=_slice_rows(rows),
        shards=Shards.of(shards_of(runs)),
        planned=len(requests),
        faulty=len(faults),
        first_fault=next(iter(faults), None),
        odd=len(odd),
        first_odd=tuple(odd[:SHOWN]),
    )


def _in_chunks(requests: Sequence[ImageRequest], planning: Planning) -> list[ImageRequest]:
    """Each request with as many chunks as its prompts need: part of its shape, so that no neighbour changes it."""
    texts = [text for request in requests for text in (request.prompt, request.negative_prompt)]
    counts = planning.model.chunks(texts, emphasis=planning.spec.generate.emphasis)
    both = zip(counts[::2], counts[1::2], strict=True)
    return [replace(request, chunks=max(pair)) for request, pair in zip(requests, both, strict=True)]


def shards_of(runs: Iterable[Run]) -> Iterator[Shard]:
    """Where each run lies in its slice, which holds the runs one after the other; counted from 0, as is the slice."""
    offset = 0
    for number, run in enumerate(runs):
        lead = run.shape or run.requests[0].shape
        yield Shard(number, 0, offset, len(run.requests), run.shape is not None, **asdict(lead))
        offset += len(run.requests)


def slices_planned(
    planning: Planning, slices: Iterable[pa.Table], first_slice: int, first_row: int, doubles: Doubles
) -> Iterator[PlannedSlice]:
    """Plan consecutive slices, some at once; the results are in order."""
    shared, task = ray.put(planning), ray.remote(**TASK)(plan_slice)

    def start() -> Iterator[ray.ObjectRef[PlannedSlice]]:
        row = first_row
        for number, rows in enumerate(slices, first_slice):
            yield task.remote(shared, rows, number, row, doubles.within(row, len(rows)))
            row += len(rows)

    return in_order(start())


def slices_digested(slices: Iterable[pa.Table]) -> Iterator[SliceRows]:
    """What each slice holds, in order."""
    task = ray.remote(**TASK)(_slice_rows)
    return in_order(task.remote(rows) for rows in slices)


def _slice_rows(rows: pa.Table) -> SliceRows:
    return SliceRows(len(rows), rows_sha256(rows))
