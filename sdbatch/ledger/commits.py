"""Commit records: the small objects whose presence means that a shard is done.

    _sdbatch/commits/00003/0000712.json  the record of shard 712 in slice 3; 0000712r2.json that of its second edition
    _sdbatch/committed/00003.parquet     all records of slice 3, once it has them; the single ones go then
    _sdbatch/committed/totals.json       sums over such slices, so that a status need not open them

Data first, metadata second, record last, each written once. Two writers on one shard leave one record. The records of a
slice are collected only when they are complete, into an object that is never written again either: one that turns up
later, from a writer who lived on, is one of those already counted.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch.errors import ObjectNotFound, StorageError
from sdbatch.ledger.plan import Shard, shard_stem
from sdbatch.ledger.reasons import DROPPED, count_reasons, summed
from sdbatch.storage import Store
from sdbatch.storage.parquet import read_parquet

_SINGLE = "_sdbatch/commits/"
_COLLECTED = "_sdbatch/committed/"
TOTALS_KEY = f"{_COLLECTED}totals.json"
_READERS = 16
#: Whatever a record says can be found again from the metadata of its shard.
_REMEDY = "remove it and run the job again, which makes nothing that is there"
_RECENT = 32  # newest records that tell how fast a job is


@dataclass(frozen=True)
class CommitRecord:
    """A shard's end: what it holds, its checksums, and how long things took."""

    shard: int
    slice: int
    fingerprint: str
    writer: str  # a word of the writer's own, so that it knows its record again
    committed: int
    quarantined: int
    bytes: int
    metadata_key: str
    metadata_sha256: str
    failures: list[dict[str, str]]  # image_id and error of each quarantined request
    seconds: dict[str, float]
    environment: dict[str, str]  # what may change a picture's bytes: device, library versions
    finished_at: float  # seconds since 1970
    edition: int = 1
    replaced: dict[str, int] = field(default_factory=dict)  # committed, quarantined, bytes of the edition before
    replaced_reasons: dict[str, int] = field(default_factory=dict)  # why it had quarantined how many

    @property
    def dropped(self) -> int:
        """Of the quarantined, those that checks dropped."""
        return sum(failure["error"].startswith(DROPPED) for failure in self.failures)


@dataclass(frozen=True)
class Totals:
    """Sums over records."""

    shards: int = 0
    committed: int = 0
    quarantined: int = 0
    bytes: int = 0
    model_seconds: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)  # why → how many are quarantined
    dropped: int = 0  # of the quarantined, those that checks dropped

    def plus(self, records: Iterable[CommitRecord]) -> Totals:
        """An edition counts what it has more than the one before."""
        shards, committed, quarantined, size = self.shards, self.committed, self.quarantined, self.bytes
        seconds, reasons, dropped = self.model_seconds, self.reasons, self.dropped
        for record in records:
            shards += record.edition == 1
            committed += record.committed - record.replaced.get("committed", 0)
            quarantined += record.quarantined - record.replaced.get("quarantined", 0)
            size += record.bytes - record.replaced.get("bytes", 0)
            seconds += record.seconds.get("model", 0.0)
            dropped += record.dropped - record.replaced.get("dropped", 0)
            if record.failures or record.replaced_reasons:
                reasons = summed(reasons, count_reasons(record.failures), record.replaced_reasons)
        return Totals(shards, committed, quarantined, size, round(seconds, 4), reasons, dropped)


def commit_key(shard: int, slice_number: int, edition: int = 1) -> str:
    return f"{_SINGLE}{slice_number:05d}/{shard_stem(shard, edition)}.json"


def put_commit(store: Store, record: CommitRecord) -> bool:
    """Commit the shard; False if another writer did so first."""
    return store.put_if_absent(commit_key(record.shard, record.slice, record.edition), _json(record).encode())


def find_commit(store: Store, shard: Shard) -> CommitRecord | None:
    """The record of this edition of the shard, if it is there and not collected yet."""
    key = commit_key(shard.number, shard.slice, shard.edition)
    try:
        return _parse(store.get(key), key)
    except ObjectNotFound:
        return None


class Commits:
    """Which shards are done, as two listings found it; records are read when they are asked for."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.single: dict[tuple[int, int], int] = {}  # shard, edition → slice
        self.collected: set[tuple[int, int]] = set()  # slice, edition
        # In this order: what is collected in between is found twice, not missed.
        for entry in store.list(_SINGLE):
            if name := re.search(r"/(\d+)/(\d+)(?:r(\d+))?\.json$", entry.key):
                self.single[int(name[2]), int(name[3] or 1)] = int(name[1])
        for entry in store.list(_COLLECTED):
            if name := re.search(r"/(\d+)(?:r(\d+))?\.parquet$", entry.key):
                self.collected.add((int(name[1]), int(name[2] or 1)))

    def done(self, numbers: np.ndarray, slices: np.ndarray, edition: int) -> np.ndarray:
        """Which of many shards, by their numbers and slices, have this edition."""
        found: np.ndarray = np.isin(slices, [of for of, collected in self.collected if collected == edition])
        return found | np.isin(numbers, [number for number, single in self.single if single == edition])

    def of_slice(self, number: int) -> dict[int, CommitRecord]:
        """Shard → its newest record, for the shards of a slice that are done."""
        found: dict[int, CommitRecord] = {}
        for edition in sorted(edition for of, edition in self.collected if of == number):
            found |= {record.shard: record for record in read_collected(self._store, number, edition)}
        for record in self._read(key for key, of in self.single.items() if of == number):
            if record.shard not in found or found[record.shard].edition < record.edition:
                found[record.shard] = record
        return found

    def newest(self) -> Iterator[CommitRecord]:
        """The record that counts of every shard that is done, in the order of the shards."""
        for number in sorted({*self.single.values(), *(number for number, _ in self.collected)}):
            for _, record in sorted(self.of_slice(number).items()):
                yield record

    def uncollected(self) -> Iterator[CommitRecord]:
        """The single records that are in no collection."""
        yield from self._read(key for key, of in self.single.items() if (of, key[1]) not in self.collected)

    def _read(self, wanted: Iterable[tuple[int, int]]) -> Iterator[CommitRecord]:
        with ThreadPoolExecutor(_READERS) as pool:
            yield from pool.map(lambda key: self._one(*key), sorted(wanted))

    def _one(self, shard: int, edition: int) -> CommitRecord:
        number = self.single[shard, edition]
        key = commit_key(shard, number, edition)
        try:
            return _parse(self._store.get(key), key)
        except ObjectNotFound:  # collected since the listing
            records = read_collected(self._store, number, edition)
            return next(record for record in records if record.shard == shard)


def collect(store: Store, number: int, edition: int, shards: Collection[int]) -> None:
    """Gather the records of a slice's ``shards`` in one object and remove the single ones.

    Nothing happens while one of them is missing.
    """
    key, singles = _collected_key(number, edition), [commit_key(shard, number, edition) for shard in shards]
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            texts = [data.decode() for data in pool.map(store.get, singles)]
        except ObjectNotFound:  # not done yet, or collected by somebody, who may have died before the single ones went
            if not store.exists(key):
                return
        else:
            buffer = io.BytesIO()
            table = pa.table({"shard": list(shards), "record": texts})
            pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
            store.put_if_absent(key, buffer.getvalue())
        list(pool.map(store.delete, singles))


def read_collected(store: Store, number: int, edition: int) -> list[CommitRecord]:
    key = _collected_key(number, edition)
    data = store.get(key)
    try:
        table = read_parquet(data, ["record"], checksums=True)
        texts = table.column("record").to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(f"{store.uri}/{key} is damaged: {' '.join(str(error).split())}; {_REMEDY}") from None
    return [_parse(text, key) for text in texts]


def read_totals(store: Store) -> Totals:
    """Sums over all records: the stored sums, collections that these don't know yet, single records."""
    return read_sums(store)[0]


def read_sums(store: Store) -> tuple[Totals, list[CommitRecord]]:
    """Sums over all records, and some of the newest records: as many as are read for the sums, or a few more."""
    stored = _stored_totals(store)  # before the listing, which then has all that they know
    commits = Commits(store)
    recent = list(commits.uncollected())
    totals = _sums_of_collections(store, commits, stored).plus(recent)
    if len(recent) < _RECENT and commits.collected:
        edition, number = max((edition, number) for number, edition in commits.collected)
        recent += read_collected(store, number, edition)
    return totals, sorted(recent, key=lambda record: record.finished_at)


def put_totals(store: Store) -> None:
    """Bring the stored sums up to date. They are a shortcut: stale ones cost time, never truth."""
    stored = _stored_totals(store)
    commits = Commits(store)
    totals, slices = _sums_of_collections(store, commits, stored), [list(one) for one in sorted(commits.collected)]
    store.put(TOTALS_KEY, json.dumps({"slices": slices, **asdict(totals)}).encode())


def renew_totals(store: Store) -> None:
    """Sum up all collections anew."""
    store.delete(TOTALS_KEY)
    put_totals(store)


def _stored_totals(store: Store) -> tuple[Totals, set[tuple[int, int]]]:
    try:
        content: dict[str, Any] = json.loads(store.get(TOTALS_KEY))
        slices = {(int(number), int(edition)) for number, edition in content.pop("slices")}
        content["reasons"].items()  # sums of a release that did not keep them are made anew
        return Totals(**content), slices
    except (ObjectNotFound, ValueError, TypeError, KeyError, AttributeError):
        return Totals(), set()


def _sums_of_collections(store: Store, commits: Commits, stored: tuple[Totals, set[tuple[int, int]]]) -> Totals:
    """The ``stored`` sums, which were read before the listing ``commits``, and what has been collected since.

    Sums that know of a collection that is not there are no good: somebody has removed it.
    """
    totals, known = stored if stored[1] <= commits.collected else (Totals(), set())
    for number, edition in sorted(commits.collected - known):
        totals = totals.plus(read_collected(store, number, edition))
    return totals


def _collected_key(number: int, edition: int) -> str:
    return f"{_COLLECTED}{number:05d}{'' if edition == 1 else f'r{edition}'}.parquet"


def _json(record: CommitRecord) -> str:
    return json.dumps(asdict(record), sort_keys=True, ensure_ascii=False)


def _parse(data: bytes | str, key: str) -> CommitRecord:
    try:
        content: Mapping[str, Any] = json.loads(data)
        return CommitRecord(**content)
    except (ValueError, TypeError) as error:
        raise StorageError(f"commit record {key} is damaged: {error}; {_REMEDY}") from None
