"""The proof that every planned image ended exactly once, from the stored bytes.

Slice by slice, so that a job of any size is checked in the memory that one slice takes.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch.errors import ObjectNotFound, StorageError
from sdbatch.ledger.commits import CommitRecord, Commits
from sdbatch.ledger.plan import Job, Shard, read_job, read_shards, read_slice
from sdbatch.storage import Entry, Store

Read = Callable[[Store, Iterable[str]], dict[str, bytes]]
#: Can a picture's bytes be opened and drawn?
Opens = Callable[[bytes], bool]
Progress = Callable[[int, int], None]

_CHECKERS = 8


@dataclass
class Verdict:
    """What :func:`verify` found. Lists hold image ids, or keys of objects for ``extra``."""

    planned: int = 0
    committed: int = 0
    quarantined: int = 0
    checked: int = 0  # images whose bytes were read; the rest is in a sample's other shards
    missing: list[str] = field(default_factory=list)  # planned, but neither made nor quarantined
    doubled: list[str] = field(default_factory=list)  # recorded more than once, or not planned at all
    altered: list[str] = field(default_factory=list)  # stored bytes that are not those recorded, or no picture
    extra: list[str] = field(default_factory=list)  # objects under data/ and metadata/ that no record names

    @property
    def ok(self) -> bool:
        return not (self.missing or self.doubled or self.altered) and self.planned == self.committed + self.quarantined


@dataclass(frozen=True)
class Findings:
    """What is stored of a shard. ``record`` is None when it is not committed; ``read`` is False outside a sample."""

    shard: Shard
    record: CommitRecord | None
    read: bool = True
    committed: int = 0
    quarantined: int = 0
    missing: tuple[str, ...] = ()
    doubled: tuple[str, ...] = ()
    altered: tuple[str, ...] = ()
    keys: frozenset[str] = frozenset()
    damaged: tuple[int, ...] = ()  # positions whose pictures are missing or altered


def verify(store: Store, read_pictures: Read, opens: Opens, progress: Progress, sample: float = 1.0) -> Verdict:
    """Read what the ledger names and compare; of a ``sample`` that fraction of the shards.

    ``read_pictures`` finds pictures by their paths.
    """
    job = read_job(store)
    verdict = Verdict(planned=job.planned)
    listings = [_Listing(store.list(prefix)) for prefix in ("data/", "metadata/")]
    for done, found in enumerate(examine(store, job, read_pictures, opens, sample), 1):
        verdict.committed += found.committed
        verdict.quarantined += found.quarantined
        verdict.checked += found.committed + found.quarantined if found.read else 0
        verdict.missing += found.missing
        verdict.doubled += found.doubled
        verdict.altered += found.altered
        if sample == 1.0:  # what no record names can be told only where all records are read
            stored = (key for listing in listings for key in listing.up_to(found.shard.number))
            verdict.extra += [key for key in stored if key not in found.keys]
        progress(done, job.shards)
    if sample == 1.0:
        verdict.extra += [key for listing in listings for key in listing.up_to(None)]
    return verdict


def examine(store: Store, job: Job, read_pictures: Read, opens: Opens, sample: float = 1.0) -> Iterator[Findings]:
    """What is stored of every shard of the job, in their order."""
    commits = Commits(store)
    chance = random.Random(job.fingerprint)
    with ThreadPoolExecutor(_CHECKERS) as pool:
        for number, shards in groupby(read_shards(store, job), key=lambda shard: shard.slice):
            records = commits.of_slice(number)
            ids = read_slice(store, job, number).column("image_id")

            def check(
                shard: Shard, read: bool, records: dict[int, CommitRecord] = records, ids: pa.ChunkedArray = ids
            ) -> Findings:
                planned = ids.slice(shard.offset, shard.count).to_pylist()
                if len(planned) != shard.count:
                    raise StorageError(f"plan slice {shard.slice} is damaged: shard {shard.number} is cut off")
                record = records.get(shard.number)
                if record is None:
                    return Findings(shard, None, read, missing=tuple(planned))
                if not read:
                    return Findings(shard, record, read, record.committed, record.quarantined)
                return _examine(store, job, shard, record, planned, read_pictures, opens)

            several = list(shards)
            yield from pool.map(check, several, [chance.random() < sample for _ in several])


def _examine(
    store: Store, job: Job, shard: Shard, record: CommitRecord, planned: list[str], read_pictures: Read, opens: Opens
) -> Findings:
    rows = _metadata(store, record)
    if rows is None or record.fingerprint != job.part_of_slice(shard.slice).fingerprint:
        everything = tuple(range(shard.count))
        keys = frozenset([record.metadata_key])
        return Findings(shard, record, altered=tuple(planned), keys=keys, damaged=everything)
    pictures = read_pictures(store, [row["path"] for row in rows if row["status"] == "committed"])
    missing, altered, damaged = [], [], []
    for position, row in enumerate(rows):
        if row["status"] != "committed":
            continue
        data = pictures.get(row["path"])
        if data is None:
            missing.append(row["image_id"])
        elif len(data) != row["bytes"] or hashlib.sha256(data).hexdigest() != row["sha256"] or not opens(data):
            altered.append(row["image_id"])
        else:
            continue
        damaged.append(position)
    recorded = [row["image_id"] for row in rows]
    made = sum(row["status"] == "committed" for row in rows)
    return Findings(
        shard,
        record,
        committed=made - len(damaged),
        quarantined=len(rows) - made,
        missing=(*missing, *sorted(set(planned) - set(recorded))),
        doubled=tuple(sorted((Counter(recorded) - Counter(planned)).keys())),
        altered=tuple(altered),
        keys=frozenset([record.metadata_key, *(row["path"].partition("#")[0] for row in rows if row["path"])]),
        damaged=tuple(damaged),
    )


def _metadata(store: Store, record: CommitRecord) -> list[dict[str, Any]] | None:
    """The metadata rows that the record vouches for; None if they are gone or other ones."""
    try:
        data = store.get(record.metadata_key)
    except ObjectNotFound:
        return None
    if hashlib.sha256(data).hexdigest() != record.metadata_sha256:
        return None
    columns = ["image_id", "status", "path", "bytes", "sha256"]
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(data), columns=columns).to_pylist()
    return rows


class _Listing:
    """Keys in their order, handed out shard by shard; their numbers are in the keys."""

    def __init__(self, entries: Iterator[Entry]) -> None:
        self._entries = entries
        self._next = next(entries, None)

    def up_to(self, shard: int | None) -> Iterator[str]:
        """The next keys, as far as they belong to shards up to this one; None: all that are left."""
        while self._next is not None:
            number = re.match(r"[a-z]+/(\d+)", self._next.key)
            if shard is not None and number is not None and int(number[1]) > shard:
                return
            yield self._next.key
            self._next = next(self._entries, None)
