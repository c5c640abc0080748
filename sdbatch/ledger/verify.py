"""The proof that every planned image ended exactly once, from the stored bytes."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch.errors import ObjectNotFound, StorageError
from sdbatch.ledger.commits import CommitRecord, find_commit
from sdbatch.ledger.plan import Job, Shard, read_job, read_shards, read_slice
from sdbatch.storage import Store

Read = Callable[[Store, Iterable[str]], dict[str, bytes]]
Progress = Callable[[int, int], None]


@dataclass
class Verdict:
    """What :func:`verify` found. Lists hold image ids, or keys of objects for ``extra``."""

    planned: int = 0
    committed: int = 0
    quarantined: int = 0
    missing: list[str] = field(default_factory=list)  # planned, but neither made nor quarantined
    doubled: list[str] = field(default_factory=list)  # recorded more than once, or not planned at all
    altered: list[str] = field(default_factory=list)  # stored bytes that are not those recorded
    extra: list[str] = field(default_factory=list)  # objects under data/ and metadata/ that no record names

    @property
    def ok(self) -> bool:
        return not (self.missing or self.doubled or self.altered) and self.planned == self.committed + self.quarantined


@dataclass(frozen=True)
class _ShardFindings:
    committed: list[str]
    quarantined: list[str]
    missing: list[str]
    doubled: list[str]
    altered: list[str]
    keys: list[str]


def verify(store: Store, read_pictures: Read, progress: Progress) -> Verdict:
    """Read everything that the ledger names and compare; ``read_pictures`` finds pictures by their paths."""
    job = read_job(store)
    shards = read_shards(store, job)
    verdict, seen, named = Verdict(planned=job.planned), Counter[str](), set[str]()
    slices = _Slices(store, job)
    with ThreadPoolExecutor(8) as pool:
        jobs = pool.map(lambda shard: _verify_shard(store, job, shard, slices, read_pictures), shards)
        for done, found in enumerate(jobs, 1):
            verdict.committed += len(found.committed)
            verdict.quarantined += len(found.quarantined)
            verdict.missing += found.missing
            verdict.doubled += found.doubled
            verdict.altered += found.altered
            seen.update(found.committed + found.quarantined)
            named.update(found.keys)
            progress(done, len(shards))
    verdict.doubled += sorted(image_id for image_id, times in seen.items() if times > 1)
    verdict.extra = [
        entry.key for prefix in ("data/", "metadata/") for entry in store.list(prefix) if entry.key not in named
    ]
    return verdict


def _verify_shard(store: Store, job: Job, shard: Shard, slices: _Slices, read_pictures: Read) -> _ShardFindings:
    planned = slices.image_ids(shard)
    record = find_commit(store, shard.number)
    if record is None:
        return _ShardFindings([], [], planned, [], [], [])
    rows = _metadata(store, record)
    if rows is None or record.fingerprint != job.fingerprint:
        return _ShardFindings([], [], [], [], planned, [record.metadata_key])
    committed = [row for row in rows if row["status"] == "committed"]
    pictures = read_pictures(store, [row["path"] for row in committed])
    missing, altered, whole = [], [], []
    for row in committed:
        data = pictures.get(row["path"])
        if data is None:
            missing.append(row["image_id"])
        elif len(data) != row["bytes"] or hashlib.sha256(data).hexdigest() != row["sha256"]:
            altered.append(row["image_id"])
        else:
            whole.append(row["image_id"])
    recorded = [row["image_id"] for row in rows]
    return _ShardFindings(
        committed=whole,
        quarantined=[row["image_id"] for row in rows if row["status"] == "quarantined"],
        missing=missing + sorted(set(planned) - set(recorded)),
        doubled=sorted(set(recorded) - set(planned)),
        altered=altered,
        keys=[record.metadata_key, *(row["path"].partition("#")[0] for row in committed)],
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


class _Slices:
    """The ids of planned images; shards come in order, so the slice at hand serves many."""

    def __init__(self, store: Store, job: Job) -> None:
        self._store, self._job = store, job
        self._kept: tuple[int, pa.Table] | None = None

    def image_ids(self, shard: Shard) -> list[str]:
        kept = self._kept
        if kept is None or kept[0] != shard.slice:
            kept = self._kept = (shard.slice, read_slice(self._store, self._job, shard.slice))
        ids: list[str] = kept[1].column("image_id").slice(shard.offset, shard.count).to_pylist()
        if len(ids) != shard.count:
            raise StorageError(f"plan slice {shard.slice} is damaged: shard {shard.number} is cut off")
        return ids
