"""A small planned job whose shards are committed by hand, without Ray and without a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from sdbatch.engine.making.shards import Ended, ShardCommitter, metadata_row
from sdbatch.ledger import Job, Part, Shard, Shards, Verdict, part_fingerprint, verify, write_job, write_slice
from sdbatch.outputs import EncodedPicture, encode, opens, read_stored
from sdbatch.prompts import ImageRequest, ModelFacts, RowIds, cut, from_table, requests_of_slice, to_table
from sdbatch.spec import JobSpec, parse_spec
from sdbatch.storage import Store


class Planned:
    """Slices of ten rows, of which the fourth can't be made, in shards of four, four and one, and one faulty."""

    def __init__(self, store: Store, form: str = "images", slices: int = 1, **output: Any) -> None:
        self.store = store
        self.spec: JobSpec = parse_spec(
            {
                "name": "t",
                "input": {"uri": "x.csv"},
                "output": {"uri": store.uri, "format": form, "shard_size": 4, **output},
            }
        )
        tables, shards = [], list[Shard]()
        for number in range(slices):
            rows: list[dict[str, str | None]] = [{"prompt": None if i == 3 else f"prompt {i}"} for i in range(10)]
            runs = cut(requests_of_slice(rows, 10 * number, self.spec, ModelFacts((64, 64)), RowIds(False)), 4)
            offset = 0
            for run in runs:
                shape = asdict(run.shape or run.requests[0].shape)
                shards.append(Shard(len(shards), number, offset, len(run.requests), run.shape is not None, **shape))
                offset += len(run.requests)
            tables.append(to_table([request for run in runs for request in run.requests], []))
        fingerprint = part_fingerprint(self.spec.deciding(), [], "f" * 64)
        part = Part(fingerprint, 10 * slices, slices, len(shards), 10 * slices, slices)
        job = Job(self.spec.model_dump(mode="json"), self.spec.deciding(), [], "f" * 64, {}, (part,))
        for number, table in enumerate(tables):
            write_slice(store, job.fingerprint, number, table)
        self.tables = tables
        self.job, self.shards = write_job(store, job, Shards.of(shards)), shards
        self.committer = self.a_committer()

    def a_committer(self) -> ShardCommitter:
        return ShardCommitter(self.store, self.spec, self.job, {})

    def requests(self, shard: Shard) -> list[ImageRequest]:
        return from_table(self.tables[shard.slice].slice(shard.offset, shard.count))

    def ended(self, shard: Shard, colour: int = 0, failing: tuple[int, ...] = ()) -> list[Ended]:
        """What making the shard gives: pictures of one colour each, but for the faulty and the ``failing``."""
        ended = []
        for position, request in enumerate(self.requests(shard)):
            error = request.fault or ("it failed" if position in failing else None)
            row = metadata_row(self.job, shard.number, request, error=error)
            picture = None
            if error is None:
                pixels = np.full((8, 8, 3), colour + position, np.uint8)
                picture = EncodedPicture(
                    position, row, encode(pixels, self.spec.output.image, row, self.job.fingerprint)
                )
            ended.append(Ended(row, picture))
        return ended

    def keep(self, shard: Shard, ended: list[Ended]) -> list[Ended]:
        """Make the pictures outlive their maker; returns them as they are stored then."""
        pictures = [end.picture for end in ended if end.picture is not None]
        kept = {one.position: one for one in self.committer.writer.keep(shard.stem, pictures, last=True)}
        return [Ended(end.row, kept.get(position)) for position, end in enumerate(ended)]

    def commit(self, number: int, colour: int = 0, failing: tuple[int, ...] = ()) -> None:
        shard = self.shards[number]
        self.committer.commit(shard, self.keep(shard, self.ended(shard, colour, failing)), {"model": 1.0}, "w")

    def verdict(self, **options: Any) -> Verdict:
        return verify(self.store, read_stored, opens, lambda done, total: None, **options)
